// The CPU backend for this machine.
#pragma once

#include <memory>
#include <string>

#include "ops/ops.h"

namespace llmc {

// Picks the widest instruction set of this build that the CPU has: avx512 (x86-64-v4), avx2 (x86-64-v3) or portable.
// The environment variable LLMC_CPU_ISA=portable|avx2|avx512 overrides; a name that cannot run here throws Error.
std::unique_ptr<Ops> make_cpu_ops();

// The instruction sets of this build that this CPU has, narrowest first, separated by spaces.
std::string available_isas();

}  // namespace llmc
