# Imported targets for the installed torch: torch_offload::torch, ::torch_python and, when torch is
# a CUDA build, ::torch_cuda.
#
# Note [Why not find_package(Torch)]: torch's own package demands a CUDA toolkit with a compiler, an
# architecture list and a linkable libcudart.so as soon as torch is a CUDA build. We compile host
# C++ only, and a fresh machine has neither; what we need is headers and a few shared libraries, and
# torch and its PyPI dependencies bring those.

find_package(
  Python 3.11
  COMPONENTS Interpreter Development.Module
  REQUIRED)

execute_process(
  COMMAND ${Python_EXECUTABLE} ${PROJECT_SOURCE_DIR}/tools/torch_facts.py
  OUTPUT_VARIABLE torch_facts
  ERROR_VARIABLE torch_facts_error
  RESULT_VARIABLE torch_facts_result
  OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT torch_facts_result EQUAL 0)
  message(FATAL_ERROR "${torch_facts_error}")
endif()
# One "set(TORCH_... ...)" a line; see tools/torch_facts.py for what each means.
cmake_language(EVAL CODE "${torch_facts}")
message(STATUS "torch ${TORCH_VERSION}, CUDA ${TORCH_CUDA_VERSION}, C++${TORCH_CXX_STANDARD}")

# import_torch_library(NAME) makes torch_offload::NAME of the library that torch ships under it.
function(import_torch_library name)
  add_library(torch_offload::${name} SHARED IMPORTED)
  set_property(TARGET torch_offload::${name} PROPERTY IMPORTED_LOCATION
                                                      ${TORCH_LIBRARY_DIR}/lib${name}.so)
endfunction()

import_torch_library(c10)
import_torch_library(torch_cpu)
add_library(torch_offload::torch INTERFACE IMPORTED)
# Imported, hence SYSTEM: our warnings are not asked of torch's headers.
target_include_directories(torch_offload::torch INTERFACE ${TORCH_INCLUDE_DIRS})
target_compile_features(torch_offload::torch INTERFACE cxx_std_${TORCH_CXX_STANDARD})
target_link_libraries(torch_offload::torch INTERFACE torch_offload::torch_cpu torch_offload::c10)

import_torch_library(torch_python)
target_include_directories(torch_offload::torch_python INTERFACE ${Python_INCLUDE_DIRS})
target_link_libraries(torch_offload::torch_python INTERFACE torch_offload::torch)

if(TORCH_CUDA_VERSION)
  import_torch_library(c10_cuda)
  add_library(torch_offload::cudart SHARED IMPORTED)
  # By its full name: the PyPI package has no libcudart.so beside libcudart.so.N.
  set_target_properties(torch_offload::cudart PROPERTIES IMPORTED_LOCATION ${TORCH_CUDART})
  import_torch_library(torch_cuda)
  target_include_directories(torch_offload::torch_cuda INTERFACE ${TORCH_CUDA_INCLUDE_DIRS})
  target_link_libraries(
    torch_offload::torch_cuda INTERFACE torch_offload::torch torch_offload::c10_cuda
                                        torch_offload::cudart)
  include(cmake/Nvcc.cmake)
endif()
