#include "ops/ops.h"

#include "core/check.h"

namespace llmc {

Ops::~Ops() = default;

int Ops::make_current() { return 0; }
void Ops::restore_current(int) {}
void* Ops::stream() { return nullptr; }
void Ops::use_workspace(Tensor) {}
void* Ops::allocate_host(size_t) { LLMC_CHECK(false, "%s has no memory apart from the host's", name()); }
void Ops::free_host(void*) {}
void Ops::fetch(int, const HostCopy*, int64_t) {}
void Ops::store(int, const HostCopy*, int64_t) {}
void Ops::finish_stores() {}
void Ops::choose_algorithms(const Algorithms&, bool) {}
Algorithms Ops::algorithms() const { return {}; }
void Ops::repeat(const std::string&, Arguments, const std::function<void()>& work) { work(); }

void Ops::quantize(const Fp8Out&, Tensor) { no_fp8(); }
void Ops::quantize_gelu(const Fp8Out&, Tensor) { no_fp8(); }
void Ops::quantize_gradient(const Fp8Out&, Tensor, Tensor, Tensor, bool) { no_fp8(); }
void Ops::fp8_layernorm_forward(const Fp8Out&, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor) { no_fp8(); }
void Ops::fp8_transpose(Tensor, Tensor) { no_fp8(); }
void Ops::fp8_scale(Tensor, Tensor, DType) { no_fp8(); }
void Ops::raise_amax(Tensor, Tensor) { no_fp8(); }
void Ops::update_fp8_scales(Tensor, Tensor, Tensor, Tensor, int64_t) { no_fp8(); }
void Ops::fp8_matmul_forward(Tensor, Fp8Matrix, Fp8Matrix, Tensor) { no_fp8(); }
void Ops::fp8_matmul_backward(Tensor, Fp8Matrix, Fp8Matrix, bool) { no_fp8(); }
void Ops::fp8_classifier(Fp8Matrix, Tensor, Tensor, Tensor, int64_t, float) { no_fp8(); }
void Ops::no_fp8() const { LLMC_CHECK(false, "%s has no FP8", name()); }

void Ops::begin_range(const char*) {}
void Ops::end_range() {}

}  // namespace llmc
