#include <torch/csrc/Exceptions.h>

#include <exception>

#include "bindings/bind.h"
#include "core/error.h"

namespace py = pybind11;

namespace torch_offload {

void bind_errors(py::module_& module) {
  static PyObject* state_error = nullptr;
  // Owned by the module's dictionary and, on purpose, for ever by this pointer: a translator may
  // run while the interpreter is going down.
  state_error = PyErr_NewExceptionWithDoc(
      "torch_offload.StateError",
      "The call was right, the state was not: a second thread, a closed handle, an edited weight.",
      PyExc_RuntimeError, nullptr);
  module.add_object("StateError", py::reinterpret_borrow<py::object>(state_error));

  // The signature is pybind11's. NOLINTNEXTLINE(performance-unnecessary-value-param)
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) {
        std::rethrow_exception(pointer);
      }
    } catch (const ValueError& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const TypeError& error) {
      PyErr_SetString(PyExc_TypeError, error.what());
    } catch (const IndexError& error) {
      PyErr_SetString(PyExc_IndexError, error.what());
    } catch (const NotImplementedError& error) {
      PyErr_SetString(PyExc_NotImplementedError, error.what());
    } catch (const MemoryError& error) {
      PyErr_SetString(PyExc_MemoryError, error.what());
    } catch (const StateError& error) {
      PyErr_SetString(state_error, error.what());
    } catch (const InternalError& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    } catch (const c10::Error&) {
      torch::translate_exception_to_python(pointer);  // keeps torch.OutOfMemoryError and the like
    }
  });
}

}  // namespace torch_offload
