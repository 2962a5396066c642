// Stream capture and graphs (CUDA Programming Guide, "CUDA Graphs").
//
// Work that is submitted to a capturing stream becomes a node, which comes after what was captured in that stream before,
// and after the events it waited for. A graph is launched as one operation of a stream: its nodes run in an order that
// their edges allow, the first, the last or any of those that are ready, by the schedule. So a fork that was not joined
// where it should have been shows as wrong data.
//
// Stricter than CUDA: a thread that captures may not wait for any stream or event, nor copy pageable memory.
#include <algorithm>
#include <set>
#include <thread>

#include "capture.h"
#include "streams.h"

namespace cudasim {

struct Node {
  const char* kind;
  std::function<void()> work;
  std::vector<size_t> after;
};
using Nodes = std::vector<Node>;

struct Capture {
  const Stream* origin;
  cudaStreamCaptureMode mode;
  std::thread::id thread = std::this_thread::get_id();
  bool broken = false;  // by a call that CUDA refuses
  Nodes nodes;
};

namespace {

struct Graph {
  std::shared_ptr<const Nodes> nodes;
};
struct Executable {
  std::shared_ptr<const Nodes> nodes;  // of the launches to come; those before keep theirs
};
std::set<Graph*> graphs;
std::set<Executable*> executables;

template <typename Object, typename Handle>
Object* find(const std::set<Object*>& objects, Handle handle, const char* what) {
  auto* object = reinterpret_cast<Object*>(handle);
  if (objects.count(object)) return object;
  report("bad-handle", "%p is not %s", static_cast<void*>(handle), what);
  return nullptr;
}

template <typename Object, typename Handle>
cudaError_t destroy(std::set<Object*>& objects, Handle handle, const char* what) {
  const ApiCall call;
  Object* object = find(objects, handle, what);
  if (!object) return fail(cudaErrorInvalidValue);
  objects.erase(object);
  delete object;
  return call.error;
}

std::set<Capture*> captures() {
  std::set<Capture*> found;
  for (const auto& stream : streams())
    if (stream->captured.in) found.insert(stream->captured.in.get());
  return found;
}

cudaError_t refuse(cudaError_t error, const std::string& what) {
  const Site site{api_caller()};
  report_site("stream-capture", site, nullptr, "%s: %s", what.c_str(), cudaGetErrorString(error));
  return fail(error);
}

cudaError_t break_capture(Capture& capture, cudaError_t error, const std::string& what) {
  capture.broken = true;
  return refuse(error, what);
}

void add(std::vector<size_t>& after, const std::vector<size_t>& more) {
  for (const size_t node : more)
    if (std::find(after.begin(), after.end(), node) == after.end()) after.push_back(node);
}

// Whether all nodes come before the end of the stream.
bool all_joined(const Nodes& nodes, const std::vector<size_t>& end) {
  std::vector<bool> before(nodes.size());
  std::vector<size_t> open = end;
  while (!open.empty()) {
    const size_t node = open.back();
    open.pop_back();
    if (before[node]) continue;
    before[node] = true;
    open.insert(open.end(), nodes[node].after.begin(), nodes[node].after.end());
  }
  return std::find(before.begin(), before.end(), false) == before.end();
}

void run(const Nodes& nodes) {
  std::vector<bool> done(nodes.size());
  const auto ready = [&](size_t i) {
    return !done[i] && std::all_of(nodes[i].after.begin(), nodes[i].after.end(), [&](size_t k) { return done[k]; });
  };
  for (size_t count = 0; count < nodes.size(); count++) {
    std::vector<size_t> choice;
    for (size_t i = 0; i < nodes.size(); i++)
      if (ready(i)) choice.push_back(i);
    const Order order = settings().order;
    const size_t next = order == Order::Forward   ? choice.front()
                        : order == Order::Reverse ? choice.back()
                                                  : choice[random_below(unsigned(choice.size()))];
    if (!sticky_error()) nodes[next].work();
    done[next] = true;
  }
}

bool same_shape(const Nodes& a, const Nodes& b, cudaGraphExecUpdateResult& why) {
  why = cudaGraphExecUpdateErrorTopologyChanged;
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); i++) {
    if (a[i].after != b[i].after) return false;
    if (std::string(a[i].kind) != b[i].kind) {
      why = cudaGraphExecUpdateErrorNodeTypeChanged;
      return false;
    }
  }
  why = cudaGraphExecUpdateSuccess;
  return true;
}

}  // namespace

cudaError_t capture(Stream& stream, const char* kind, std::function<void()> work) {
  Capture& capture = *stream.captured.in;
  if (capture.broken) return refuse(cudaErrorStreamCaptureInvalidated, kind);
  if (kind == std::string("free")) return break_capture(capture, cudaErrorNotSupported, "cudaFreeAsync");
  capture.nodes.push_back({kind, std::move(work), stream.captured.after});
  stream.captured.after = {capture.nodes.size() - 1};
  return cudaSuccess;
}

cudaError_t capture_record(Stream& stream, Event& event) {
  if (stream.captured.in->broken) return refuse(cudaErrorStreamCaptureInvalidated, "recording an event");
  event.captured = stream.captured;
  return cudaSuccess;
}

cudaError_t capture_wait(Stream& stream, const Event& event) {
  const auto &own = stream.captured.in, &other = event.captured.in;
  if (!other) {
    if (!event.time) return cudaSuccess;  // never recorded
    return break_capture(*own, cudaErrorStreamCaptureIsolation, "waiting for an event that was not captured");
  }
  if (!captures().count(other.get()))  // it has ended
    return refuse(cudaErrorCapturedEvent, "waiting for an event of a capture that has ended");
  if (other->broken) return refuse(cudaErrorStreamCaptureInvalidated, "waiting for an event");
  if (own && own != other) {
    own->broken = true;
    return break_capture(*other, cudaErrorStreamCaptureMerge, "waiting for an event of another capture");
  }
  if (&stream == streams()[0].get())
    return break_capture(*other, cudaErrorStreamCaptureImplicit, "the default stream cannot be captured");
  stream.captured.in = other;
  add(stream.captured.after, event.captured.after);
  return cudaSuccess;
}

cudaError_t refuse_implicit(const Stream& stream) {
  if (&stream != streams()[0].get()) return cudaSuccess;
  for (const auto& other : streams())
    if (other->blocking && other->captured.in)
      return break_capture(*other->captured.in, cudaErrorStreamCaptureImplicit, "the default stream");
  return cudaSuccess;
}

cudaError_t refuse_in_capture(const char* what, const Stream* stream) {
  if (stream && stream->captured.in)
    return break_capture(*stream->captured.in, cudaErrorStreamCaptureUnsupported, what);
  for (Capture* capture : captures()) {
    const bool own = capture->thread == std::this_thread::get_id();
    if (capture->mode == cudaStreamCaptureModeGlobal || (own && capture->mode == cudaStreamCaptureModeThreadLocal))
      return break_capture(*capture, cudaErrorStreamCaptureUnsupported, what);
  }
  return cudaSuccess;
}

cudaError_t refuse_beside_captures(const char* what) {
  for (Capture* capture : captures()) return break_capture(*capture, cudaErrorStreamCaptureUnsupported, what);
  return cudaSuccess;
}

cudaError_t refuse_event(const char* what, const Event& event) {
  if (!event.captured.in) return refuse_in_capture(what);
  event.captured.in->broken = true;
  return refuse(cudaErrorCapturedEvent, what);
}

}  // namespace cudasim

using namespace cudasim;

// --- capture ---------------------------------------------------------------------------------------------------------

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  const ApiCall call;
  if (call.error) return call.error;
  const auto stream = find_stream(handle);
  if (!stream) return fail(cudaErrorInvalidResourceHandle);
  if (stream == streams()[0]) return refuse(cudaErrorStreamCaptureUnsupported, "the default stream cannot be captured");
  if (stream->captured.in)
    return break_capture(*stream->captured.in, cudaErrorIllegalState, "the stream is capturing already");
  stream->captured = {std::make_shared<Capture>(), {}};
  stream->captured.in->origin = stream.get();
  stream->captured.in->mode = mode;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* result) {
  const ApiCall call;
  *result = nullptr;
  const auto stream = find_stream(handle);
  if (!stream) return fail(cudaErrorInvalidResourceHandle);
  const Captured end = stream->captured;
  if (!end.in) return refuse(cudaErrorIllegalState, "the end of a capture that was not begun");
  if (end.in->origin != stream.get())
    return break_capture(*end.in, cudaErrorStreamCaptureUnmatched, "the end of a capture");
  if (end.in->mode != cudaStreamCaptureModeRelaxed && end.in->thread != std::this_thread::get_id())
    return break_capture(*end.in, cudaErrorStreamCaptureWrongThread, "the end of a capture");
  for (const auto& other : streams())
    if (other->captured.in == end.in) other->captured = {};
  if (call.error) return call.error;
  if (end.in->broken) return fail(cudaErrorStreamCaptureInvalidated);
  if (!all_joined(end.in->nodes, end.after)) return refuse(cudaErrorStreamCaptureUnjoined, "the end of a capture");
  auto* graph = new Graph{std::make_shared<const Nodes>(std::move(end.in->nodes))};
  graphs.insert(graph);
  *result = reinterpret_cast<cudaGraph_t>(graph);
  return cudaSuccess;
}

// --- graphs ----------------------------------------------------------------------------------------------------------

cudaError_t cudaGraphDestroy(cudaGraph_t handle) { return destroy(graphs, handle, "a graph"); }

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* result, cudaGraph_t handle, unsigned long long flags) {
  const ApiCall call;
  if (call.error) return call.error;
  const Graph* graph = find(graphs, handle, "a graph");
  if (!graph) return fail(cudaErrorInvalidValue);
  if (flags) {
    report("not-simulated", "cudaGraphInstantiate: flags %llu", flags);
    return fail(cudaErrorNotSupported);
  }
  auto* executable = new Executable{graph->nodes};
  executables.insert(executable);
  *result = reinterpret_cast<cudaGraphExec_t>(executable);
  return cudaSuccess;
}

cudaError_t cudaGraphExecUpdate(cudaGraphExec_t exec, cudaGraph_t handle, cudaGraphExecUpdateResultInfo* info) {
  const ApiCall call;
  if (call.error) return call.error;
  Executable* executable = find(executables, exec, "an executable graph");
  const Graph* graph = find(graphs, handle, "a graph");
  if (!executable || !graph) return fail(cudaErrorInvalidValue);
  *info = {};
  if (!same_shape(*executable->nodes, *graph->nodes, info->result)) return fail(cudaErrorGraphExecUpdateFailure);
  executable->nodes = graph->nodes;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t handle) { return destroy(executables, handle, "an executable graph"); }

cudaError_t cudaGraphLaunch(cudaGraphExec_t handle, cudaStream_t stream_handle) {
  const ApiCall call;
  if (call.error) return call.error;
  const Executable* executable = find(executables, handle, "an executable graph");
  const auto stream = find_stream(stream_handle);
  if (!executable || !stream) return fail(cudaErrorInvalidValue);
  if (stream->captured.in) {
    report("not-simulated", "cudaGraphLaunch into a capturing stream");
    return fail(cudaErrorNotSupported);
  }
  count_launch();
  return submit(stream_handle, "graph", [nodes = executable->nodes] { run(*nodes); });
}
