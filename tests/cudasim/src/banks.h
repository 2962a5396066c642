// Bank conflicts of instrumented kernels: see banks.cpp.
#pragma once

#include <string>

#include "core.h"

#pragma GCC visibility push(hidden)
namespace cudasim {

void begin_counted_launch(const std::string& kernel);
// An access of the running thread to shared memory. site: the checker's number of its place.
void count_shared_access(const volatile void* p, size_t bytes, bool write, unsigned site);
void finish_counted_block();

}  // namespace cudasim
#pragma GCC visibility pop
