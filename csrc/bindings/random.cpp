// llmc._C.random: the generators of core/random.h, for tests and experiments.
#include <ATen/ops/empty.h>

#include "bindings/bindings.h"
#include "core/check.h"
#include "core/random.h"

namespace llmc::bindings {

void register_random(py::module_& module) {
  using namespace py::literals;
  py::module_ m = module.def_submodule("random", "The random number generators of the core.");
  m.def(
      "normal",
      [](uint32_t seed, int64_t n, float mean, float std) {
        LLMC_CHECK(n >= 1, "normal: n=%ld must be at least 1", long(n));
        std::mt19937 generator(seed);
        at::Tensor out = at::empty({n}, at::TensorOptions(at::kFloat));
        normal_fill(generator, out.mutable_data_ptr<float>(), n, mean, std);
        return py::make_tuple(out, uint32_t(generator()));
      },
      "seed"_a, "n"_a, "mean"_a, "std"_a,
      "(n normal values as torch's CPU normal_ draws them, the next 32 random bits)");
  m.def(
      "squirrel5", [](uint32_t position, uint32_t seed) { return squirrel5(position, seed); }, "position"_a, "seed"_a);
  m.def("noise_2d", [](uint32_t x, uint32_t y, uint32_t seed) { return noise_2d(x, y, seed); }, "x"_a, "y"_a, "seed"_a);
  m.def(
      "stochastic_round", [](float x, uint32_t noise) { return stochastic_round(x, noise).bits; }, "x"_a, "noise"_a,
      "The bits of x rounded to bf16 with 16 bits of noise.");
  m.def(
      "xorshift64",
      [](uint64_t state) {
        XorShift64 rng{state};
        const uint32_t value = rng.next();
        return py::make_tuple(value, rng.state);
      },
      "state"_a, "(32 random bits, new state) of xorshift64*.");
}

}  // namespace llmc::bindings
