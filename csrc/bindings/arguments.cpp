#include <algorithm>
#include <cctype>
#include <cinttypes>
#include <sstream>

#include "bindings/bindings.h"
#include "bindings/devices.h"
#include "core/check.h"

namespace llmc::bindings {

DType parse_dtype(const std::string& name) {
  LLMC_CHECK(name == "fp32" || name == "bf16", "the dtype is %s, it must be fp32 or bf16", name.c_str());
  return name == "fp32" ? DType::F32 : DType::BF16;
}

at::ScalarType torch_dtype(DType dtype) {
  constexpr at::ScalarType kTypes[] = {at::kFloat, at::kBFloat16, at::kInt, at::kFloat8_e4m3fn, at::kFloat8_e5m2};
  return kTypes[int(dtype)];
}

DType Arguments::check_dtype(const char* name, at::ScalarType type, const std::string& expected) {
  const auto require = [&](bool allowed, const std::string& what) {
    LLMC_CHECK(allowed, "%s: %s is %s, it must be %s", operation_.c_str(), name, c10::toString(type), what.c_str());
  };
  if (expected == "i32") {
    require(type == at::kInt, "int32");
    return DType::I32;
  }
  if (expected == "f32") {
    require(type == at::kFloat, "fp32");
    return DType::F32;
  }
  if (expected == "fp8") {
    require(type == at::kFloat8_e4m3fn || type == at::kFloat8_e5m2, "float8_e4m3fn or float8_e5m2");
    return type == at::kFloat8_e4m3fn ? DType::E4M3 : DType::E5M2;
  }
  require(type == at::kFloat || type == at::kBFloat16, "fp32 or bf16");
  const DType dtype = type == at::kFloat ? DType::F32 : DType::BF16;
  if (expected == "any" || (expected == "G" && dtype == DType::F32)) return dtype;  // fp32 gradients go with every X
  const DType bound = dtypes_.emplace("X", dtype).first->second;
  require(dtype == bound, std::string(name_of(bound)) + (expected == "G" ? " or fp32" : " as the arguments before it"));
  return dtype;
}

void Arguments::wrong_shape(const char* name, const at::Tensor& tensor, const char* shape) const {
  std::ostringstream message;
  message << operation_ << ": " << name << " has shape (";
  for (int64_t i = 0; i < tensor.dim(); i++) message << (i ? ", " : "") << tensor.size(i);
  message << "), it must be (" << shape << ")";
  const char* separator = " with ";
  for (const auto& [symbol, value] : dimensions_) {
    message << separator << symbol << "=" << value;
    separator = ", ";
  }
  throw_error(__FILE__, __LINE__, "%s", message.str().c_str());
}

Tensor Arguments::in(const char* name, const at::Tensor& tensor, const char* dtype, const char* shape) {
  const char* operation = operation_.c_str();
  LLMC_CHECK(tensor.defined(), "%s: %s is missing", operation, name);
  const Device device = device_of(operation, name, tensor);
  if (seen_.empty()) device_ = device;
  LLMC_CHECK(device == device_, "%s: %s is on %s, %s on %s", operation, name, name_of(device).c_str(),
             seen_.front().name, name_of(device_).c_str());
  LLMC_CHECK(tensor.is_contiguous(), "%s: %s is not contiguous, call .contiguous()", operation, name);
  LLMC_CHECK(tensor.numel() > 0, "%s: %s is empty", operation, name);
  const DType actual = check_dtype(name, tensor.scalar_type(), dtype);

  std::vector<std::string> symbols;
  std::istringstream words(shape);
  for (std::string word; words >> word;) symbols.push_back(word);
  const int64_t ndim = int64_t(symbols.size());
  const bool absorbs = symbols.front() == "N";
  if (absorbs ? tensor.dim() < ndim : tensor.dim() != ndim) wrong_shape(name, tensor, shape);
  Tensor view{tensor.data_ptr(), actual, int(ndim), {1, 1, 1, 1}};
  LLMC_CHECK(!device.cuda || reinterpret_cast<uintptr_t>(view.data) % 16 == 0,
             "%s: %s must start at a multiple of 16 bytes on CUDA, call .clone()", operation, name);
  for (int64_t i = 0; i < ndim; i++) {
    int64_t extent = tensor.size(tensor.dim() - ndim + i);
    if (i == 0 && absorbs) {
      for (int64_t leading = 0; leading < tensor.dim() - ndim; leading++) extent *= tensor.size(leading);
    }
    const int64_t factor = std::isdigit(static_cast<unsigned char>(symbols[i][0])) ? symbols[i][0] - '0' : 1;
    const std::string symbol = factor > 1 ? symbols[i].substr(1) : symbols[i];
    const int64_t bound = dimensions_.emplace(symbol, extent / factor).first->second;
    if (extent != bound * factor) wrong_shape(name, tensor, shape);
    view.shape[i] = extent;
  }
  const char* begin = static_cast<const char*>(view.data);
  seen_.push_back({name, begin, begin + view.bytes()});
  return view;
}

Tensor Arguments::out(const char* name, const at::Tensor& tensor, const char* dtype, const char* shape,
                      std::initializer_list<const char*> may_be) {
  const Tensor view = in(name, tensor, dtype, shape);
  LLMC_CHECK(!tensor.requires_grad(), "%s: %s is written and must not require grad, use torch.no_grad() or .detach()",
             operation_.c_str(), name);
  const Seen own = seen_.back();
  for (size_t i = 0; i + 1 < seen_.size(); i++) {
    const Seen& other = seen_[i];
    const bool allowed =
        own.begin == other.begin && own.end == other.end &&
        std::any_of(may_be.begin(), may_be.end(), [&](std::string known) { return known == other.name; });
    LLMC_CHECK(allowed || own.end <= other.begin || other.end <= own.begin, "%s: %s is written and overlaps %s",
               operation_.c_str(), name, other.name);
  }
  return view;
}

std::vector<int32_t> Arguments::checked_ids(const char* name, Tensor ids, int64_t limit) const {
  std::vector<int32_t> host(ids.numel());
  CurrentOps(device_)->download(host.data(), ids);
  for (size_t i = 0; i < host.size(); i++) {
    LLMC_CHECK(host[i] >= 0 && host[i] < limit, "%s: %s holds %d at index %zu, ids must be in [0, %" PRId64 ")",
               operation_.c_str(), name, host[i], i, limit);
  }
  return host;
}

}  // namespace llmc::bindings
