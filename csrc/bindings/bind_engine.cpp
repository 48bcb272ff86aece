#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>

#include "bindings/bind.h"
#include "params/engine.h"
#include "params/user_warning.h"

namespace py = pybind11;

namespace torch_offload {

namespace {

using RangePair = std::pair<std::size_t, std::size_t>;

std::vector<ParameterRange> ranges_from(const std::vector<RangePair>& pairs) {
  std::vector<ParameterRange> ranges;
  ranges.reserve(pairs.size());
  for (const auto& [begin, end] : pairs) {
    ranges.push_back({begin, end});
  }
  return ranges;
}

std::vector<at::Tensor> tensors_or_undefined(const std::vector<std::optional<at::Tensor>>& given) {
  std::vector<at::Tensor> tensors;
  tensors.reserve(given.size());
  for (const std::optional<at::Tensor>& tensor : given) {
    tensors.push_back(tensor.value_or(at::Tensor()));
  }
  return tensors;
}

}  // namespace

void bind_engine(py::module_& module) {
  py::class_<Stats>(module, "Stats", "What the pipeline did since it was made.")
      .def_readonly("forwards", &Stats::forwards)
      .def_readonly("onloads", &Stats::onloads)
      .def_readonly("prefetched", &Stats::prefetched)
      .def_readonly("misses", &Stats::misses)
      .def_readonly("hits", &Stats::hits)
      .def_readonly("extra_places", &Stats::extra_places)
      .def_readonly("bytes_onloaded", &Stats::bytes_onloaded);

  py::class_<UnitStats>(module, "UnitStats", "What happened to one unit.")
      .def_readonly("acquired", &UnitStats::acquired)
      .def_readonly("onloads", &UnitStats::onloads)
      .def_readonly("misses", &UnitStats::misses);

  py::class_<PackedMaster, std::shared_ptr<PackedMaster>>(
      module, "PackedMaster", "Where a parameter at rest has its weights, packed.")
      .def("unpacked", &PackedMaster::unpacked)
      .def("unpack", &PackedMaster::unpack, py::arg("parameter"));

  using ParameterTuple =
      std::tuple<std::string, at::Tensor, std::vector<std::pair<py::dict, py::str>>,
                 std::shared_ptr<FileView>>;
  py::class_<Engine, std::shared_ptr<Engine>>(
      module, "Engine", "The parameters of one model, their masters and places.")
      .def(py::init([](std::shared_ptr<Device> device, const at::Device& torch_device,
                       const std::string& mode, const std::string& streams, bool poison_on_release,
                       std::vector<ParameterTuple> parameters, Plan plan,
                       const std::vector<RangePair>& ranges, bool wait_for_each,
                       std::optional<std::size_t> lock_limit_bytes,
                       const std::vector<std::shared_ptr<FileView>>& residents,
                       const std::optional<py::function>& packed_class_of,
                       const std::optional<py::function>& tensors_of_model) {
             std::vector<ParameterSpec> specs;
             for (auto& [name, parameter, slots, view] : parameters) {
               ParameterSpec& spec = specs.emplace_back();
               spec.name = name;
               spec.parameter = parameter;
               spec.view = view;
               for (auto& [dict, key] : slots) {
                 spec.slots.push_back({dict, key});
               }
             }
             PipelineOptions options;
             options.mode = parse_mode(mode);
             options.layout = parse_stream_layout(streams);
             options.poison_on_release = poison_on_release;
             options.wait_for_each = wait_for_each;
             options.warn = [](const std::string& text) { warn_user(text, PyExc_RuntimeWarning); };
             return std::make_shared<Engine>(
                 std::move(device), torch_device, options, std::move(specs), std::move(plan),
                 ranges_from(ranges), lock_limit_bytes.value_or(LockedFiles::kNoLimit), residents,
                 packed_class_of ? py::object(*packed_class_of) : py::object(),
                 tensors_of_model ? py::object(*tensors_of_model) : py::object());
           }),
           py::arg("device"), py::arg("torch_device"), py::arg("mode"), py::arg("streams"),
           py::arg("poison_on_release"), py::arg("parameters"), py::arg("plan"), py::arg("ranges"),
           py::arg("wait_for_each") = false, py::arg("lock_limit_bytes") = py::none(),
           py::arg("residents") = std::vector<std::shared_ptr<FileView>>{},
           py::arg("packed_class_of") = py::none(), py::arg("tensors_of_model") = py::none())
      .def("move_in", &Engine::move_in, py::arg("unit"))
      .def("copy_resident", &Engine::copy_resident, py::arg("view"), py::arg("destination"))
      .def("lock_files", &Engine::lock_files, py::arg("unit"))
      .def("move_out", &Engine::move_out)
      .def(
          "pack",
          [](Engine& engine, const std::vector<std::size_t>& most_bytes,
             const std::vector<std::optional<at::Tensor>>& counts) {
            engine.pack(most_bytes, tensors_or_undefined(counts));
          },
          py::arg("most_bytes"), py::arg("counts") = std::vector<std::optional<at::Tensor>>{})
      .def(
          "content",
          [](Engine& engine, UnitIndex unit) {
            std::vector<std::tuple<std::string, std::size_t, std::size_t, std::uint64_t>> contents;
            for (const Engine::ParameterContent& one : engine.content(unit)) {
              contents.emplace_back(one.name, one.place_offset, one.size_bytes, one.checksum);
            }
            return contents;
          },
          py::arg("unit"))
      .def(
          "offer_blobs",
          [](Engine& engine, const std::vector<std::optional<at::Tensor>>& blobs) {
            engine.offer_blobs(tensors_or_undefined(blobs));
          },
          py::arg("blobs"))
      .def_property_readonly("blobs_taken", &Engine::blobs_taken)
      .def(
          "packed_blob",
          [](const Engine& engine, UnitIndex unit) -> std::optional<at::Tensor> {
            const at::Tensor blob = engine.packed_blob(unit);
            return blob.defined() ? std::optional<at::Tensor>(blob) : std::nullopt;
          },
          py::arg("unit"))
      .def_property_readonly("transport_bytes", &Engine::transport_bytes)
      .def_property_readonly("staging_bytes", &Engine::staging_bytes)
      .def_property_readonly("packed_resident_bytes", &Engine::packed_resident_bytes)
      .def_property_readonly("bytes_copied", &Engine::bytes_copied)
      .def(
          "recut",
          [](Engine& engine, Plan plan, const std::vector<RangePair>& ranges) {
            return engine.recut(std::move(plan), ranges_from(ranges));
          },
          py::arg("plan"), py::arg("ranges"))
      .def("call_unit", &Engine::call, py::arg("unit"), py::arg("call_plain"), py::arg("module"),
           py::arg("args"), py::arg("kwargs"))
      .def(
          "call_ancestor",
          [](Engine& engine, const py::handle& call_plain, const py::handle& module,
             const py::tuple& args, const py::dict& kwargs) {
            return engine.call(kNoUnit, call_plain, module, args, kwargs);
          },
          py::arg("call_plain"), py::arg("module"), py::arg("args"), py::arg("kwargs"))
      .def("refresh", &Engine::refresh)
      .def("find_edits", &Engine::find_edits)
      .def("num_copies", &Engine::num_copies, py::arg("unit"))
      .def("bytes_in_files", &Engine::bytes_in_files, py::arg("unit"))
      .def("attach_log", &Engine::attach_log, py::arg("log"), py::arg("times") = false)
      .def("close", &Engine::close)
      .def("at_rest", &Engine::at_rest, py::arg("call"), py::arg("function"))
      .def_property_readonly("is_closed", &Engine::is_closed)
      .def_property_readonly("in_pass",
                             [](const Engine& engine) { return engine.pipeline().in_pass(); })
      .def_property_readonly("plan", &Engine::plan)
      .def_property_readonly("stats",
                             [](const Engine& engine) { return engine.pipeline().stats(); })
      .def_property_readonly("window_bytes",
                             [](const Engine& engine) { return engine.pipeline().window_bytes(); })
      .def(
          "unit_stats",
          [](const Engine& engine, UnitIndex unit) { return engine.pipeline().unit_stats(unit); },
          py::arg("unit"))
      .def(
          "is_whole",
          [](const Engine& engine, UnitIndex unit) { return engine.pipeline().is_whole(unit); },
          py::arg("unit"))
      .def_property_readonly("window",
                             [](const Engine& engine) {
                               const AddressRange window = engine.pipeline().window();
                               return py::make_tuple(window.begin, window.end);
                             })
      .def_property_readonly("host_bytes", &Engine::host_bytes)
      .def("unlock_residents", &Engine::unlock_residents)
      .def_property_readonly("file_bytes_locked", &Engine::file_bytes_locked)
      .def_property_readonly("cpu_seconds", &Engine::cpu_seconds)
      .def_property_readonly("streams", &Engine::streams)
      .def("parameter_names", &Engine::parameter_names, py::arg("unit"));
}

}  // namespace torch_offload
