# torch_offload_add_kernels(NAME SOURCE) makes the static library NAME of one CUDA source, where
# there is a compiler for it: the target is missing otherwise, and the build goes on without.
#
# Note [Why not enable_language(CUDA)]: CMake tries the compiler by linking a program, which asks
# for libraries that the compiler's packages on PyPI do not bring. A kernel needs to be compiled
# alone: the runtime that it is linked with is the one that torch has loaded.

set(TORCH_OFFLOAD_CUDA_ARCHITECTURES
    "80;86;89;90"
    CACHE STRING "GPUs to compile kernels for; newer ones compile the last of these when loaded")

string(REGEX MATCH "^[0-9]+" cuda_major "${TORCH_CUDA_VERSION}")
find_program(
  TORCH_OFFLOAD_NVCC nvcc
  HINTS ENV
        CUDACXX
        ENV
        CUDA_HOME
        ENV
        CUDA_PATH
        ENV
        CUDAToolkit_ROOT
        ${TORCH_LIBRARY_DIR}/../../nvidia/cu${cuda_major}
  PATHS /usr/local/cuda
  PATH_SUFFIXES bin
  DOC "Compiler of the kernels; without one, packed weights are not decoded by GPUs")
if(IS_EXECUTABLE "$ENV{CUDACXX}" AND NOT IS_DIRECTORY "$ENV{CUDACXX}")
  set(TORCH_OFFLOAD_NVCC $ENV{CUDACXX})
endif()

# A runtime of another major version than the compiler's would refuse the kernels.
set(torch_offload_nvcc_fits FALSE)
if(TORCH_OFFLOAD_NVCC)
  execute_process(
    COMMAND ${TORCH_OFFLOAD_NVCC} --version
    OUTPUT_VARIABLE nvcc_says
    ERROR_QUIET)
  if(nvcc_says MATCHES "release ([0-9]+)\\.[0-9]+" AND CMAKE_MATCH_1 STREQUAL cuda_major)
    set(torch_offload_nvcc_fits TRUE)
  endif()
endif()
if(torch_offload_nvcc_fits)
  message(STATUS "Kernels: ${TORCH_OFFLOAD_NVCC}, for ${TORCH_OFFLOAD_CUDA_ARCHITECTURES}")
else()
  message(STATUS "Kernels: none, as there is no nvcc of CUDA ${cuda_major}")
endif()

function(torch_offload_add_kernels name source)
  if(NOT torch_offload_nvcc_fits)
    return()
  endif()
  set(flags -std=c++17 -O3 --expt-relaxed-constexpr -ccbin ${CMAKE_CXX_COMPILER})
  list(APPEND flags "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra")
  if(TORCH_OFFLOAD_WERROR)
    list(APPEND flags -Werror=all-warnings)
  endif()
  foreach(architecture IN LISTS TORCH_OFFLOAD_CUDA_ARCHITECTURES)
    list(APPEND flags -gencode=arch=compute_${architecture},code=sm_${architecture})
  endforeach()
  list(GET TORCH_OFFLOAD_CUDA_ARCHITECTURES -1 newest)
  list(APPEND flags -gencode=arch=compute_${newest},code=compute_${newest})
  set(object ${CMAKE_CURRENT_BINARY_DIR}/${name}.o)
  add_custom_command(
    OUTPUT ${object}
    COMMAND ${TORCH_OFFLOAD_NVCC} ${flags} -I${CMAKE_CURRENT_SOURCE_DIR} -MD -MF ${object}.d -c
            ${CMAKE_CURRENT_SOURCE_DIR}/${source} -o ${object}
    DEPENDS ${source}
    DEPFILE ${object}.d
    COMMENT "Compiling kernels ${source}"
    VERBATIM)
  set_source_files_properties(${object} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
  add_library(${name} STATIC ${object})
  set_target_properties(${name} PROPERTIES LINKER_LANGUAGE CXX)
  target_include_directories(${name} PUBLIC ${CMAKE_CURRENT_SOURCE_DIR})
endfunction()
