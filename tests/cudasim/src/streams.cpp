// Streams and events: work in order per stream, with dependencies between streams.
//
// Usually work runs in the call that submits it. In lazy mode it is queued and runs only when something waits for it,
// and then only what that needs: a missing wait or a host buffer that is written too early shows as stale or wrong
// data.
#include "streams.h"

#include <set>

#include "capture.h"

namespace cudasim {

std::vector<std::shared_ptr<Stream>>& streams() {
  static std::vector<std::shared_ptr<Stream>> streams{std::make_shared<Stream>()};
  return streams;
}

std::shared_ptr<Stream> find_stream(cudaStream_t handle) {
  if (!handle || handle == cudaStreamLegacy) return streams()[0];
  for (const auto& stream : streams())
    if (stream.get() == reinterpret_cast<Stream*>(handle) && stream != streams()[0]) return stream;
  report("bad-handle", "%p is not a stream", static_cast<void*>(handle));
  return nullptr;
}

namespace {

std::set<Event*> events;
double simulated_clock = 0;  // milliseconds

Event* find_event(cudaEvent_t handle) {
  auto* event = reinterpret_cast<Event*>(handle);
  if (events.count(event)) return event;
  report("bad-handle", "%p is not an event", static_cast<void*>(handle));
  return nullptr;
}

void run_until(const Point& point);

void run_next(Stream& stream) {
  Operation operation = std::move(stream.pending.front());
  stream.pending.pop_front();
  for (const Point& point : operation.after) run_until(point);
  if (operation.work && !sticky_error()) operation.work();
  stream.done++;
}

void run_until(const Point& point) {
  while (point.stream->done < point.position) run_next(*point.stream);
}

Point end_of(const std::shared_ptr<Stream>& stream) { return {stream, stream->submitted}; }
bool finished(const Point& point) { return point.stream->done >= point.position; }

void submit_after(const std::shared_ptr<Stream>& stream, std::vector<Point> after, std::function<void()> work) {
  if (stream == streams()[0]) {
    for (const auto& other : streams())
      if (other != stream && other->blocking) after.push_back(end_of(other));
  } else if (stream->blocking) {
    after.push_back(end_of(streams()[0]));
  }
  stream->pending.push_back({std::move(work), std::move(after)});
  stream->submitted++;
  if (!settings().lazy) run_until(end_of(stream));
}

// A waiting program that polls must not spin for ever: each query lets one operation run.
cudaError_t poll(const Point& point) {
  if (!finished(point)) run_next(*point.stream);
  if (sticky_error()) return sticky_error();
  return finished(point) ? cudaSuccess : cudaErrorNotReady;
}

}  // namespace

cudaError_t submit(cudaStream_t handle, const char* kind, std::function<void()> work) {
  const auto stream = find_stream(handle);
  if (!stream) return fail(cudaErrorInvalidResourceHandle);
  if (cudaError_t error = refuse_implicit(*stream)) return error;
  if (stream->captured.in) return capture(*stream, kind, std::move(work));
  submit_after(stream, {}, std::move(work));
  return cudaSuccess;
}

void enqueue(cudaStream_t stream, std::function<void()> work) {
  const ApiCall call;
  submit(stream, "library", std::move(work));
}

void pass_time(double milliseconds) { simulated_clock += milliseconds; }

cudaError_t synchronize(cudaStream_t handle) {
  const auto stream = find_stream(handle);
  if (!stream) return fail(cudaErrorInvalidResourceHandle);
  if (cudaError_t error = refuse_implicit(*stream)) return error;
  if (cudaError_t error = refuse_in_capture("waiting for a stream", stream.get())) return error;
  run_until(end_of(stream));
  return sticky_error();
}

// Streams take turns in the order of the schedule.
void synchronize_all() {
  for (;;) {
    std::vector<Stream*> waiting;
    for (const auto& stream : streams())
      if (!stream->pending.empty()) waiting.push_back(stream.get());
    if (waiting.empty()) return;
    const Order order = settings().order;
    run_next(*waiting[order == Order::Forward   ? 0
                      : order == Order::Reverse ? waiting.size() - 1
                                                : random_below(unsigned(waiting.size()))]);
  }
}

}  // namespace cudasim

using namespace cudasim;

// --- streams ---------------------------------------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned flags) {
  const ApiCall call;
  if (call.error) return call.error;
  if (flags & ~unsigned(cudaStreamNonBlocking)) return fail(cudaErrorInvalidValue);
  const auto stream = std::make_shared<Stream>();
  stream->blocking = flags != cudaStreamNonBlocking;
  streams();
  streams().push_back(stream);
  *handle = reinterpret_cast<cudaStream_t>(stream.get());
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t* handle) { return cudaStreamCreateWithFlags(handle, cudaStreamDefault); }

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned flags, int) {
  return cudaStreamCreateWithFlags(handle, flags);
}

// Work that is still queued will run.
cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  const ApiCall call;
  const auto stream = find_stream(handle);
  if (!stream || stream == streams()[0]) return fail(cudaErrorInvalidResourceHandle);
  if (stream->captured.in) refuse_in_capture("destroying the stream", stream.get());
  run_until(end_of(stream));
  for (auto it = streams().begin(); it != streams().end(); ++it) {
    if (*it == stream) {
      streams().erase(it);
      break;
    }
  }
  return call.error;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const ApiCall call;
  return call.error ? call.error : synchronize(stream);
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  const ApiCall call;
  if (call.error) return call.error;
  const auto stream = find_stream(handle);
  if (!stream) return fail(cudaErrorInvalidResourceHandle);
  if (cudaError_t error = refuse_implicit(*stream)) return error;
  if (cudaError_t error = refuse_in_capture("querying a stream", stream.get())) return error;
  return poll(end_of(stream));
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  const ApiCall call;
  if (call.error) return call.error;
  const auto stream = find_stream(handle);
  Event* event = find_event(event_handle);
  if (!stream || !event) return fail(cudaErrorInvalidResourceHandle);
  if (cudaError_t error = refuse_implicit(*stream)) return error;
  if (stream->captured.in || event->captured.in) return capture_wait(*stream, *event);
  if (event->time) submit_after(stream, {event->recorded}, {});
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  const ApiCall call;
  if (call.error) return call.error;
  if (cudaError_t error = refuse_beside_captures("waiting for the device")) return error;
  synchronize_all();
  return sticky_error();
}

// --- events ----------------------------------------------------------------------------------------------------------

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned flags) {
  const ApiCall call;
  if (call.error) return call.error;
  auto* event = new Event;
  event->timing = !(flags & cudaEventDisableTiming);
  events.insert(event);
  *handle = reinterpret_cast<cudaEvent_t>(event);
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* handle) { return cudaEventCreateWithFlags(handle, cudaEventDefault); }

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  const ApiCall call;
  Event* event = find_event(handle);
  if (!event) return fail(cudaErrorInvalidResourceHandle);
  events.erase(event);
  delete event;
  return call.error;
}

cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
  const ApiCall call;
  if (call.error) return call.error;
  const auto stream = find_stream(stream_handle);
  Event* event = find_event(handle);
  if (!stream || !event) return fail(cudaErrorInvalidResourceHandle);
  if (cudaError_t error = refuse_implicit(*stream)) return error;
  if (stream->captured.in) return capture_record(*stream, *event);
  event->captured = {};
  event->time = std::make_shared<double>();
  event->recorded = {stream, stream->submitted + 1};
  submit_after(stream, {}, [time = event->time] { *time = simulated_clock; });
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  const ApiCall call;
  if (call.error) return call.error;
  Event* event = find_event(handle);
  if (!event) return fail(cudaErrorInvalidResourceHandle);
  if (cudaError_t error = refuse_event("waiting for an event", *event)) return error;
  if (event->time) run_until(event->recorded);
  return sticky_error();
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
  const ApiCall call;
  if (call.error) return call.error;
  Event* event = find_event(handle);
  if (!event) return fail(cudaErrorInvalidResourceHandle);
  if (cudaError_t error = refuse_event("querying an event", *event)) return error;
  return event->time ? poll(event->recorded) : cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start_handle, cudaEvent_t end_handle) {
  const ApiCall call;
  if (call.error) return call.error;
  Event* start = find_event(start_handle);
  Event* end = find_event(end_handle);
  if (!start || !end || !start->time || !end->time || !start->timing || !end->timing)
    return fail(cudaErrorInvalidResourceHandle);
  if (!finished(start->recorded) || !finished(end->recorded)) return fail(cudaErrorNotReady);
  *milliseconds = static_cast<float>(*end->time - *start->time);
  return cudaSuccess;
}
