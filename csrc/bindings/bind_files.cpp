#include <ATen/ATen.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>

#include "bindings/bind.h"
#include "core/file_view.h"

namespace py = pybind11;

namespace torch_offload {

void bind_files(py::module_& module) {
  py::class_<FileMapping, std::shared_ptr<FileMapping>>(
      module, "FileMapping", "A file of a checkpoint, mapped read-only and shared.")
      .def(py::init<std::string>(), py::arg("path"))
      .def_property_readonly("path", &FileMapping::path)
      .def_property_readonly("size_bytes", &FileMapping::size_bytes)
      .def("check_unchanged", &FileMapping::check_unchanged);

  using BlockTuple = std::tuple<std::shared_ptr<FileMapping>, std::size_t, std::size_t>;
  py::class_<FileView, std::shared_ptr<FileView>>(
      module, "FileView", "Blocks of files, one behind the other in copy-on-write memory.")
      .def(py::init([](const std::vector<BlockTuple>& tuples) {
             std::vector<FileBlock> blocks;
             blocks.reserve(tuples.size());
             for (const auto& [file, offset, size_bytes] : tuples) {
               blocks.push_back({file, offset, size_bytes});
             }
             const py::gil_scoped_release no_gil;
             return std::make_shared<FileView>(std::move(blocks));
           }),
           py::arg("blocks"))
      .def_property_readonly("size_bytes", &FileView::size_bytes)
      .def_property_readonly("copied_bytes", &FileView::copied_bytes)
      .def_property_readonly(
          "address",
          [](const FileView& view) { return reinterpret_cast<std::uintptr_t>(view.data()); })
      .def_property_readonly("first_byte",
                             [](const FileView& view) {
                               const FileBlock& block = view.blocks().front();
                               return py::make_tuple(block.file->path(), block.offset);
                             })
      .def("check_unchanged", &FileView::check_unchanged)
      .def("is_edited", &FileView::is_edited, py::call_guard<py::gil_scoped_release>())
      .def(
          "tensor",
          [](const std::shared_ptr<FileView>& view, const at::ScalarType dtype,
             const std::vector<std::int64_t>& sizes) {
            return at::from_blob(
                view->data(), sizes, [view](void*) {}, at::TensorOptions().dtype(dtype));
          },
          py::arg("dtype"), py::arg("sizes"),
          "The view as a contiguous tensor with a storage of its own, which keeps it alive.");
}

}  // namespace torch_offload
