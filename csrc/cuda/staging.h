// Pinned host memory through which small uploads go, so that neither the host nor the device waits for the other.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstddef>

namespace llmc::cuda {

// A ring of pinned buffers. Each upload takes the next one; a buffer is written again only when the copy that read it has
// run. The ring holds the uploads of two micro-steps (tokens, targets, token order), so that the host can prepare one while
// the device is busy with the other.
class Staging {
 public:
  Staging() = default;
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  // Enqueues a copy of bytes from host to device; host may be changed when it returns.
  void upload(void* device, const void* host, size_t bytes, cudaStream_t stream);

 private:
  struct Buffer {
    void* memory = nullptr;
    size_t bytes = 0;
    cudaEvent_t copied = nullptr;  // the last copy out of it
  };
  static constexpr size_t kLargest = size_t(4) << 20;  // bytes of one copy; larger uploads are cut

  void upload_piece(void* device, const void* host, size_t bytes, cudaStream_t stream);

  std::array<Buffer, 6> buffers_;
  size_t next_ = 0;
};

}  // namespace llmc::cuda
