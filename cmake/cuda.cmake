# The CUDA backend: whether it is built, with which tools, and how.
#
# Uses SITE_PACKAGES and TORCH_DIR. Nothing here asks for a GPU. Provides
#   LLMC_CUDA          cache variable: AUTO builds the backend if all it needs is there, ON fails with one sentence if
#                      something is missing, OFF never builds it
#   LLMC_HAVE_CUDA     whether it is built
#   LLMC_CUDNN         cache variable: ON also builds the attention through cuDNN, and fails with one sentence if something
#                      is missing; OFF, the default, does not look for it
#   CUDA_HEADERS       include folders of cudart, CCCL, NVTX, cuBLASLt and NCCL, to be used as SYSTEM ones. Found
#                      without nvcc too; empty if a header is missing
#   CUDA_RPATHS        the folders of cuBLASLt, NCCL and cuDNN at run time
#   add_cuda_backend(TARGET)  adds csrc/cuda and NCCL to a library; without CUDA, the files that say so
#
# NVIDIA's wheels (scripts/cuda_wheels.txt) lie in site-packages/nvidia; their shared libraries have versioned names
# only. cudart is linked statically, as cuBLASLt and NCCL do it themselves: it opens the driver, libcuda.so.1, when it is
# first called, so that the extension can be loaded on a machine without one.
set(LLMC_CUDA AUTO CACHE STRING "Build the CUDA backend: AUTO, ON or OFF")
set_property(CACHE LLMC_CUDA PROPERTY STRINGS AUTO ON OFF)
if(NOT LLMC_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "LLMC_CUDA is '${LLMC_CUDA}', it must be AUTO, ON or OFF")
endif()

set(LLMC_CUDNN OFF CACHE STRING "Build the attention through cuDNN: ON or OFF")
set_property(CACHE LLMC_CUDNN PROPERTY STRINGS ON OFF)
if(NOT LLMC_CUDNN MATCHES "^(ON|OFF)$")
  message(FATAL_ERROR "LLMC_CUDNN is '${LLMC_CUDNN}', it must be ON or OFF")
endif()

# The wheels of the environment we build for. Those of an isolated build environment count only if torch is still to be
# installed: the torch that comes then brings the same ones.
set(CUDA_WHEELS "${SITE_PACKAGES}/nvidia")
if(NOT EXISTS "${SITE_PACKAGES}/torch")
  list(APPEND CUDA_WHEELS "${TORCH_DIR}/../nvidia")
endif()

set(CUDA_MISSING "")

# --- the compiler -----------------------------------------------------------------------------------------------------
# In the cache under CMake's own name, which it would not let us change later in a build folder.
if(DEFINED ENV{CUDACXX} AND NOT CMAKE_CUDA_COMPILER)
  set(CMAKE_CUDA_COMPILER "$ENV{CUDACXX}" CACHE FILEPATH "The CUDA compiler")
endif()
find_program(CMAKE_CUDA_COMPILER nvcc HINTS ${CUDA_WHEELS} ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda
             PATH_SUFFIXES cu13/bin bin)
set(CUDA_TOOLKIT /usr/local/cuda)
if(CMAKE_CUDA_COMPILER)
  # An empty file tells whether it works with our C++ compiler, and (-v) where its own headers and libraries are.
  set(probe "${CMAKE_BINARY_DIR}/CMakeFiles/nvcc_probe")
  file(WRITE "${probe}.cu" "")
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" -v -arch=sm_80 -ccbin "${CMAKE_CXX_COMPILER}" -c "${probe}.cu"
                          -o "${probe}.o"
                  RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --version OUTPUT_VARIABLE version ERROR_QUIET)
  if(output MATCHES "TOP=([^\r\n]+)")
    get_filename_component(CUDA_TOOLKIT "${CMAKE_MATCH_1}" REALPATH)
  endif()
  string(REGEX MATCH "release ([0-9.]+)" version "${version}")
  if(NOT version MATCHES "release 13\\.")
    list(APPEND CUDA_MISSING "nvcc of CUDA 13 (${CMAKE_CUDA_COMPILER} says '${version}')")
  elseif(NOT status EQUAL 0)
    string(REGEX MATCH "[^\n]*(error|fatal)[^\n]*" reason "${output}")
    list(APPEND CUDA_MISSING "an nvcc that works with ${CMAKE_CXX_COMPILER} (${CMAKE_CUDA_COMPILER}: ${reason})")
  endif()
else()
  list(APPEND CUDA_MISSING "nvcc")
endif()
if(CUDA_MISSING)
  unset(CMAKE_CUDA_COMPILER CACHE)  # looked for again the next time
endif()

# --- headers and libraries: those of cudart must fit the compiler, for the others the wheels come first, as for torch ---
set(CUDA_HEADERS "")
macro(find_cuda_header header) # the folders to look in follow
  unset(folder)
  find_path(folder ${header} NO_CACHE HINTS ${ARGN}
            PATH_SUFFIXES cu13/include/cccl cu13/include nccl/include include/cccl include)
  if(folder)
    string(REGEX REPLACE "/$" "" folder "${folder}")
    list(APPEND CUDA_HEADERS "${folder}")
  else()
    list(APPEND CUDA_MISSING ${header})
    set(header_missing ON)
  endif()
endmacro()
macro(find_cuda_library variable file)
  find_library(${variable} ${file} NO_CACHE HINTS ${ARGN} PATH_SUFFIXES cu13/lib nccl/lib lib64 lib)
  if(NOT ${variable})
    list(APPEND CUDA_MISSING ${file})
  endif()
endmacro()

set(header_missing OFF)
foreach(header cuda_runtime.h crt/host_config.h cuda_bf16.h nv/target nvtx3/nvToolsExt.h)
  find_cuda_header(${header} ${CUDA_TOOLKIT} ${CUDA_WHEELS})
endforeach()
foreach(header cublasLt.h nccl.h)
  find_cuda_header(${header} ${CUDA_WHEELS} ${CUDA_TOOLKIT})
endforeach()
list(REMOVE_DUPLICATES CUDA_HEADERS)
if(header_missing)
  set(CUDA_HEADERS "")
endif()
find_cuda_library(CUDART_STATIC libcudart_static.a ${CUDA_TOOLKIT} ${CUDA_WHEELS})
find_cuda_library(CUBLASLT libcublasLt.so.13 ${CUDA_WHEELS} ${CUDA_TOOLKIT})
find_cuda_library(NCCL libnccl.so.2 ${CUDA_WHEELS} ${CUDA_TOOLKIT})

# cuDNN and the C++ headers of its frontend, whose wheel puts them into site-packages/include. Older ones of cuDNN have no
# deterministic backward pass on Blackwell; newer frontends also need NVRTC to be compiled.
set(CUDNN_VERSION 9.18)
set(CUDNN_FRONTEND_VERSION 1.18)
function(read_version variable file prefix) # 9.20 of the macros PREFIX_MAJOR(_VERSION) and PREFIX_MINOR(_VERSION)
  file(STRINGS ${file} lines REGEX "^#define ${prefix}_M(AJOR|INOR)(_VERSION)? [0-9]+")
  string(REGEX REPLACE ".*MAJOR[A-Z_]* ([0-9]+).*MINOR[A-Z_]* ([0-9]+).*" "\\1.\\2" version "${lines}")
  set(${variable} "${version}" PARENT_SCOPE)
endfunction()
set(CUDNN_MISSING "")
if(LLMC_CUDNN)
  find_path(CUDNN_INCLUDE cudnn_version.h NO_CACHE HINTS ${CUDA_WHEELS} ${CUDA_TOOLKIT}
            PATH_SUFFIXES cudnn/include include)
  find_library(CUDNN libcudnn.so.9 NO_CACHE HINTS ${CUDA_WHEELS} ${CUDA_TOOLKIT} PATH_SUFFIXES cudnn/lib lib64 lib)
  find_path(CUDNN_FRONTEND cudnn_frontend_version.h NO_CACHE HINTS "${SITE_PACKAGES}" PATH_SUFFIXES include)
  if(CUDNN_INCLUDE)
    read_version(version_found "${CUDNN_INCLUDE}/cudnn_version.h" CUDNN)
  endif()
  if(NOT CUDNN_INCLUDE OR NOT CUDNN)
    list(APPEND CUDNN_MISSING "cuDNN ${CUDNN_VERSION} or newer, of version 9")
  elseif(NOT version_found MATCHES "^9\\." OR version_found VERSION_LESS CUDNN_VERSION)
    list(APPEND CUDNN_MISSING "cuDNN ${CUDNN_VERSION} or newer, of version 9 (${CUDNN_INCLUDE} has ${version_found})")
  endif()
  if(CUDNN_FRONTEND)
    read_version(version_found "${CUDNN_FRONTEND}/cudnn_frontend_version.h" CUDNN_FRONTEND)
  endif()
  if(NOT CUDNN_FRONTEND)
    list(APPEND CUDNN_MISSING "cudnn_frontend.h of version ${CUDNN_FRONTEND_VERSION}")
  elseif(NOT version_found STREQUAL CUDNN_FRONTEND_VERSION)
    list(APPEND CUDNN_MISSING
         "cudnn_frontend.h of version ${CUDNN_FRONTEND_VERSION} (${CUDNN_FRONTEND} has ${version_found})")
  endif()
endif()

# --- the decision -----------------------------------------------------------------------------------------------------
list(JOIN CUDA_MISSING ", " missing)
set(LLMC_HAVE_CUDA OFF)
if(LLMC_CUDA STREQUAL "OFF")
  message(STATUS "CUDA backend: no, LLMC_CUDA=OFF")
elseif(NOT CUDA_MISSING)
  set(LLMC_HAVE_CUDA ON)
  message(STATUS "CUDA backend: yes, ${CMAKE_CUDA_COMPILER} (${version}), ${CUBLASLT}, ${NCCL}")
elseif(LLMC_CUDA STREQUAL "AUTO")
  message(STATUS "CUDA backend: no, missing: ${missing}")
else()
  message(FATAL_ERROR "LLMC_CUDA=ON, but the CUDA backend cannot be built without: ${missing}. "
                      "This brings all it needs: pip install -r scripts/cuda_wheels.txt")
endif()

if(LLMC_CUDNN)
  if(NOT LLMC_HAVE_CUDA)
    message(FATAL_ERROR "LLMC_CUDNN=ON needs the CUDA backend: LLMC_CUDA=ON says what is missing for that")
  endif()
  list(JOIN CUDNN_MISSING ", " missing)
  if(CUDNN_MISSING)
    message(FATAL_ERROR "LLMC_CUDNN=ON, but attention through cuDNN cannot be built without: ${missing}. "
                        "This brings all it needs: pip install -r scripts/cudnn_wheels.txt")
  endif()
  message(STATUS "Attention through cuDNN: yes, ${CUDNN}, ${CUDNN_FRONTEND}")
else()
  set(CUDNN "")
endif()

if(LLMC_HAVE_CUDA)
  # Where the libraries will be: beside the installed package, in the environment of an editable one, or in a toolkit.
  set(CUDA_RPATHS "")
  set(wheels cu13 nccl)
  if(LLMC_CUDNN)
    list(APPEND wheels cudnn)
  endif()
  foreach(wheel ${wheels})
    list(APPEND CUDA_RPATHS "$ORIGIN/../nvidia/${wheel}/lib" "${SITE_PACKAGES}/nvidia/${wheel}/lib")
  endforeach()
  foreach(library ${CUBLASLT} ${NCCL} ${CUDNN})
    get_filename_component(folder ${library} DIRECTORY)
    if(NOT folder MATCHES "/nvidia/(cu13|nccl|cudnn)/lib$")
      list(APPEND CUDA_RPATHS ${folder})
    endif()
  endforeach()
  list(REMOVE_DUPLICATES CUDA_RPATHS)

  set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
  # Ampere, Hopper and Blackwell, and through the last one's PTX what comes after it. No PTX of less than 9.0, which newer
  # devices could take: csrc/cuda/launch.h counts on griddepcontrol there.
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100)
  get_filename_component(folder ${CUDART_STATIC} DIRECTORY)
  set(ENV{CUDAFLAGS} "$ENV{CUDAFLAGS} -L${folder}")  # the nvcc of the wheels looks in lib64, which they do not have
  enable_language(CUDA)
  set(CMAKE_CUDA_FLAGS_RELEASE "-O3")
endif()

function(add_cuda_backend target)
  if(NOT LLMC_HAVE_CUDA)
    target_sources(${target} PRIVATE csrc/cuda/no_cuda.cpp csrc/comm/no_nccl.cpp)
    return()
  endif()
  file(GLOB sources CONFIGURE_DEPENDS csrc/cuda/*.cu csrc/cuda/*.cpp)
  list(FILTER sources EXCLUDE REGEX "/no_cuda\\.cpp$")
  if(LLMC_CUDNN)
    list(FILTER sources EXCLUDE REGEX "/no_cudnn\\.cpp$")
  else()
    list(FILTER sources EXCLUDE REGEX "/cudnn_[a-z]+\\.cpp$")
  endif()
  add_library(llmc_cuda OBJECT ${sources} csrc/comm/nccl.cpp)
  target_compile_features(llmc_cuda PRIVATE cxx_std_17 cuda_std_17)
  target_include_directories(llmc_cuda PRIVATE csrc)
  target_include_directories(llmc_cuda SYSTEM PRIVATE ${CUDA_HEADERS})
  if(LLMC_CUDNN)
    target_include_directories(llmc_cuda SYSTEM PRIVATE ${CUDNN_INCLUDE} ${CUDNN_FRONTEND})
    # The frontend is a minute's work for the optimizer, and runs on the host only.
    set_source_files_properties(csrc/cuda/cudnn_attention.cpp csrc/cuda/cudnn_graph.cpp PROPERTIES COMPILE_OPTIONS -O1)
  endif()
  # A kernel that spills registers compiles with a warning; with CUDAFLAGS="-Werror all-warnings" not at all.
  target_compile_options(llmc_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-warn-spills>)
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:llmc_cuda>)
  target_link_libraries(${target} PUBLIC ${CUBLASLT} ${NCCL} ${CUDNN})
endfunction()
