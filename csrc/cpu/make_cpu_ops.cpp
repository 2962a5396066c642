#include "cpu/make_cpu_ops.h"

#include <cstdlib>

#include "core/check.h"

// Each instruction set's copy of the kernels: CMakeLists.txt builds portable always, the others where the compiler has
// them.
namespace llmc::cpu {
namespace portable {
Ops* create();
}
namespace avx2 {
Ops* create();
}
namespace avx512 {
Ops* create();
}
}  // namespace llmc::cpu

namespace llmc {
namespace {

struct Isa {
  const char* name;
  bool (*runs_here)();
  Ops* (*create)();
};

#ifdef LLMC_HAVE_AVX2
// x86-64-v3. All of it: virtual machines mask single features.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt") &&
         __builtin_cpu_supports("movbe");
}
#endif

#ifdef LLMC_HAVE_AVX512
// x86-64-v4.
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Narrowest first.
const Isa kIsas[] = {
    {"portable", [] { return true; }, cpu::portable::create},
#ifdef LLMC_HAVE_AVX2
    {"avx2", has_avx2, cpu::avx2::create},
#endif
#ifdef LLMC_HAVE_AVX512
    {"avx512", has_avx512, cpu::avx512::create},
#endif
};

}  // namespace

std::unique_ptr<Ops> make_cpu_ops() {
  const char* value = std::getenv("LLMC_CPU_ISA");
  const std::string wanted = value == nullptr ? "" : value;
  const Isa* choice = nullptr;
  for (const Isa& isa : kIsas) {
    if (isa.runs_here() && (wanted.empty() || isa.name == wanted)) choice = &isa;
  }
  LLMC_CHECK(choice != nullptr, "LLMC_CPU_ISA=%s cannot run here: unset it or use one of: %s", wanted.c_str(),
             available_isas().c_str());
  return std::unique_ptr<Ops>(choice->create());
}

std::string available_isas() {
  std::string names;
  for (const Isa& isa : kIsas) {
    if (!isa.runs_here()) continue;
    if (!names.empty()) names += ' ';
    names += isa.name;
  }
  return names;
}

}  // namespace llmc
