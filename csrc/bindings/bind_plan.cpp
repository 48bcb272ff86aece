#include <pybind11/stl.h>

#include "bindings/bind.h"
#include "core/error.h"
#include "core/plan.h"

namespace py = pybind11;

namespace torch_offload {

namespace {

const char* name_of(UnitKind kind) { return kind == UnitKind::kMha ? "mha" : "ffn"; }

UnitKind parse_unit_kind(const std::string& name) {
  for (const UnitKind kind : {UnitKind::kMha, UnitKind::kFfn}) {
    if (name == name_of(kind)) {
      return kind;
    }
  }
  throw ValueError("expected the kind of a unit to be 'mha' or 'ffn', got '" + name + "'");
}

std::vector<Transport> parse_transports(const std::vector<std::string>& names) {
  std::vector<Transport> transports;
  transports.reserve(names.size());
  for (const std::string& name : names) {
    transports.push_back(parse_transport(name));
  }
  return transports;
}

}  // namespace

void bind_plan(py::module_& module) {
  py::class_<Unit>(module, "Unit", "What moves as one: its flat size in bytes, layer and kind.")
      .def(py::init([](std::string name, std::size_t size_bytes, std::uint32_t layer_index,
                       const std::string& kind) {
             return Unit{std::move(name), size_bytes, layer_index, parse_unit_kind(kind)};
           }),
           py::arg("name"), py::arg("size_bytes"), py::arg("layer_index"), py::arg("kind"))
      .def_readonly("name", &Unit::name)
      .def_readonly("size_bytes", &Unit::size_bytes)
      .def_readonly("layer_index", &Unit::layer_index)
      .def_property_readonly("kind", [](const Unit& unit) { return name_of(unit.kind); });

  py::class_<Plan>(module, "Plan", "Which units stay resident, and the place of each other one.")
      .def_readonly("units", &Plan::units)
      .def_property_readonly("places",
                             [](const Plan& plan) {
                               py::list places;
                               for (const auto& place : plan.places) {
                                 if (place) {
                                   places.append(py::make_tuple(place->begin, place->end));
                                 } else {
                                   places.append(py::none());
                                 }
                               }
                               return places;
                             })
      .def_readonly("overlaps", &Plan::overlaps)
      .def_readonly("window_bytes", &Plan::window_bytes)
      .def_readonly("depth_bytes", &Plan::depth_bytes)
      .def_readonly("resident_bytes", &Plan::resident_bytes)
      .def_readonly("decode_depth_bytes", &Plan::decode_depth_bytes)
      .def_readonly("one_ring", &Plan::one_ring)
      .def_readonly("staging_slots", &Plan::staging_slots)
      .def_property_readonly("transports", [](const Plan& plan) {
        std::vector<const char*> names;
        names.reserve(plan.units.size());
        for (UnitIndex unit = 0; unit < plan.units.size(); ++unit) {
          names.push_back(name_of(plan.transport(unit)));
        }
        return names;
      });

  module.def(
      "make_plan",
      [](std::vector<Unit> units, std::optional<std::size_t> depth_bytes,
         std::optional<std::size_t> window_bytes, std::vector<bool> resident,
         const std::vector<std::string>& transports, std::size_t decode_depth_bytes, bool one_ring,
         std::size_t staging_slots) {
        const py::gil_scoped_release no_gil;
        return make_plan({std::move(units), std::move(resident), depth_bytes, window_bytes,
                          parse_transports(transports), decode_depth_bytes, one_ring,
                          staging_slots});
      },
      py::arg("units"), py::arg("depth_bytes") = py::none(), py::arg("window_bytes") = py::none(),
      py::arg("resident") = std::vector<bool>{}, py::arg("transports") = std::vector<std::string>{},
      py::arg("decode_depth_bytes") = 0, py::arg("one_ring") = false,
      py::arg("staging_slots") = kStagingSlots,
      "Gives each streamed unit a range of one window. Pure.");
  module.def("aligned_size", &aligned_size, py::arg("size_bytes"),
             "size_bytes rounded up to the alignment of every slice and place, 256 bytes.");
}

}  // namespace torch_offload
