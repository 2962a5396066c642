// Working memory of one thread.
#pragma once

#include <cstdint>

namespace llmc::cpu {

// A buffer of at least `floats` floats, aligned to 4096 bytes, with undefined contents. It belongs to the calling thread
// and stays valid until that thread's next call; it grows on demand and is freed when the thread ends. It is called
// inside parallel regions, where nobody could catch an exception: without memory it reports the size and aborts.
float* thread_scratch(int64_t floats);

}  // namespace llmc::cpu
