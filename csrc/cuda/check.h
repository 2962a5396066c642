// Every status of CUDA and cuBLASLt is checked: a failure is an Error with the call, the library's words, file and line.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime.h>

#include "core/check.h"

#define LLMC_CUDA_CHECK(call)                                                                              \
  do {                                                                                                     \
    const cudaError_t llmc_status = (call);                                                                \
    LLMC_CHECK(llmc_status == cudaSuccess, "CUDA: %s failed: %s", #call, cudaGetErrorString(llmc_status)); \
  } while (0)

#define LLMC_CUBLAS_CHECK(call)                                                        \
  do {                                                                                 \
    const cublasStatus_t llmc_status = (call);                                         \
    LLMC_CHECK(llmc_status == CUBLAS_STATUS_SUCCESS, "cuBLASLt: %s failed: %s", #call, \
               cublasLtGetStatusString(llmc_status));                                  \
  } while (0)
