// Stream capture (graphs.cpp): what becomes of work in a capturing stream, and what must not be done meanwhile. What CUDA
// refuses is reported with its place in the program, and breaks the capture.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <memory>

#pragma GCC visibility push(hidden)
namespace cudasim {

struct Event;
struct Stream;

// For a stream that is capturing: the work becomes a node, the event stands for what came before it.
cudaError_t capture(Stream& stream, const char* kind, std::function<void()> work);
cudaError_t capture_record(Stream& stream, Event& event);
// For a stream that is capturing, or an event that was recorded in one: the stream takes part in the capture.
cudaError_t capture_wait(Stream& stream, const Event& event);

// Success, unless the stream is the legacy default stream and a stream that is ordered with it is capturing.
cudaError_t refuse_implicit(const Stream& stream);

// Success, unless the stream is capturing, or the call is one that the mode of a capture forbids to this thread.
cudaError_t refuse_in_capture(const char* what, const Stream* stream = nullptr);

// Success, unless anything is capturing.
cudaError_t refuse_beside_captures(const char* what);

// Success, unless the event was captured, or the mode of a capture forbids it to this thread.
cudaError_t refuse_event(const char* what, const Event& event);

}  // namespace cudasim
#pragma GCC visibility pop
