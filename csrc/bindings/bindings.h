// llmc._C: the only files that see pybind11 and torch. Each register_* function adds one part of the module.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <map>
#include <string>
#include <vector>

#include "core/device.h"
#include "core/tensor.h"

namespace llmc::bindings {

namespace py = pybind11;

void register_ops(py::module_& module);
void register_communicators(py::module_& module);
void register_model(py::module_& module);
void register_random(py::module_& module);
void register_chess(py::module_& module);
void register_build_info(py::module_& module);

DType parse_dtype(const std::string& name);  // "fp32" or "bf16"
at::ScalarType torch_dtype(DType dtype);

// Checks the arguments of one call against the contract and makes views of them. Letters of dtypes and dimensions are
// bound by their first use; a mismatch throws Error with the operation, the argument and both shapes or dtypes.
class Arguments {
 public:
  explicit Arguments(std::string operation) : operation_(std::move(operation)) {}

  // A tensor that is only read. dtype: "f32", "i32", "X" (fp32 or bf16, alike in all X arguments), "G" (X or fp32) or
  // "any" (fp32 or bf16) or "fp8" (float8_e4m3fn or float8_e5m2).
  // shape: dimensions separated by spaces, each a name with an optional factor: "B T 3C". N takes all leading dimensions.
  Tensor in(const char* name, const at::Tensor& tensor, const char* dtype, const char* shape);

  // A tensor that is written: autograd must not know it, and it must not overlap the arguments before it, except, where
  // the contract says so, those named in `may_be`.
  Tensor out(const char* name, const at::Tensor& tensor, const char* dtype, const char* shape,
             std::initializer_list<const char*> may_be = {});

  int64_t dimension(const std::string& symbol) const { return dimensions_.at(symbol); }

  // Of all arguments so far; they must be on one device.
  Device device() const { return device_; }

  // The ids in host memory; waits for the device if they are not there yet. Throws unless all are in [0, limit).
  std::vector<int32_t> checked_ids(const char* name, Tensor ids, int64_t limit) const;

 private:
  DType check_dtype(const char* name, at::ScalarType type, const std::string& expected);
  [[noreturn]] void wrong_shape(const char* name, const at::Tensor& tensor, const char* shape) const;

  struct Seen {
    const char* name;
    const char* begin;
    const char* end;
  };

  std::string operation_;
  Device device_;
  std::vector<Seen> seen_;
  std::map<std::string, int64_t> dimensions_;
  std::map<std::string, DType> dtypes_;
};

}  // namespace llmc::bindings
