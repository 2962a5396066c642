// llmc._C.Communicator: ranks on CPUs through Gloo, ranks on GPUs through NCCL (comm/nccl.h).
//
// Gloo comes with torch, without headers of its own: Python makes the process group, and here its collectives are called
// through c10d.
#include <ATen/ops/from_blob.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <deque>
#include <utility>

#include "bindings/bindings.h"
#include "bindings/devices.h"
#include "comm/communicator.h"
#include "comm/failure.h"
#include "comm/nccl.h"
#include "core/check.h"

namespace llmc::bindings {
namespace {

// The ranks of a torch.distributed process group, whose time-out it has.
//
// A sum goes around the ring of ranks, each slice from another rank on, and is rounded to the dtype after each addition
// and, for an average, after the division; the last rank of a slice hands the result to all others. So bf16 averages of
// P ranks are rounded P times.
class Gloo final : public Communicator {
 public:
  explicit Gloo(const std::string& group_name) {
    try {
      backend_ = c10d::resolve_process_group(group_name)->getBackend(c10::DeviceType::CPU);
    } catch (const std::exception& error) {
      throw_error(__FILE__, __LINE__, "there is no process group '%s' for CPU tensors: %s", group_name.c_str(),
                  words(error).c_str());
    }
    LLMC_CHECK(backend_->getBackendName() == "gloo", "the process group '%s' uses %s, it must use gloo",
               group_name.c_str(), backend_->getBackendName().c_str());
  }

  ~Gloo() override { abandon(); }
  Gloo(const Gloo&) = delete;
  Gloo& operator=(const Gloo&) = delete;

  int rank() const override { return backend_->getRank(); }
  int size() const override { return backend_->getSize(); }

  void attach(void*) override {}

  Ticket all_reduce_average(Tensor x, const std::string& what) override {
    return all_reduce("all_reduce", x, c10d::ReduceOp::AVG, what);
  }

  Ticket all_reduce_sum(Tensor x, const std::string& what) override {
    return all_reduce("all_reduce", x, c10d::ReduceOp::SUM, what);
  }

  // The c10d operation of that name reduces a copy of everything.
  Ticket reduce_scatter_average(Tensor x, const std::string& what) override {
    return all_reduce("reduce_scatter", x, c10d::ReduceOp::AVG, what);
  }

  // A broadcast of each slice: works in place, while c10d's all_gather copies everything through a buffer of its own.
  Ticket all_gather(Tensor x, Tensor own, const std::string& what) override {
    return issue({"all_gather", what}, {x, own}, [&](Works& works) {
      const int64_t n = own.numel();
      const Tensor place = slice_elements(x, rank() * n, (rank() + 1) * n);
      if (place.data != own.data) std::memcpy(place.data, own.data, size_t(own.bytes()));
      for (int root = 0; root < size(); root++) {
        std::vector<at::Tensor> slice{torch_tensor(slice_elements(x, root * n, (root + 1) * n))};
        c10d::BroadcastOptions options;
        options.rootRank = root;
        works.push_back(backend_->broadcast(slice, options));
      }
    });
  }

  void wait(Ticket ticket) override { complete(ticket); }
  void finish(Ticket ticket) override { complete(ticket); }

 private:
  using Works = std::vector<c10::intrusive_ptr<c10d::Work>>;

  struct Collective {
    std::string operation, what;
    Ticket ticket = 0;
    std::vector<Tensor> tensors = {};
    Works works = {};
  };

  // The first sentence of the message, without the place in Gloo's sources that it begins with.
  static std::string words(const std::exception& error) {
    const std::string text = error.what();
    const size_t place = text.rfind("[/", 0) == 0 ? text.find("] ") : std::string::npos;
    const size_t begin = place == std::string::npos ? 0 : place + 2;
    return text.substr(begin, std::min(text.find('\n', begin), text.find(". ", begin)) - begin);
  }

  static at::Tensor torch_tensor(const Tensor& x) {
    return at::from_blob(x.data, {x.numel()}, at::TensorOptions(torch_dtype(x.dtype)));
  }

  static bool overlap(const Tensor& a, const Tensor& b) {
    const char *begin_a = a.as<char>(), *begin_b = b.as<char>();
    return begin_a < begin_b + b.bytes() && begin_b < begin_a + a.bytes();
  }

  Ticket all_reduce(const char* operation, Tensor x, c10d::ReduceOp::RedOpType op, const std::string& what) {
    return issue({operation, what}, {x}, [&](Works& works) {
      std::vector<at::Tensor> tensors{torch_tensor(x)};
      c10d::AllreduceOptions options;
      options.reduceOp = op;
      works.push_back(backend_->allreduce(tensors, options));
    });
  }

  // Gloo's threads run several collectives at a time: those that share memory must wait for each other here.
  template <typename Start>
  Ticket issue(Collective collective, std::vector<Tensor> tensors, Start start) {
    LLMC_CHECK(failure_.empty(), "%s", failure_.c_str());
    for (auto other = under_way_.rbegin(); other != under_way_.rend(); ++other) {
      const bool shares = std::any_of(other->tensors.begin(), other->tensors.end(), [&](const Tensor& a) {
        return std::any_of(tensors.begin(), tensors.end(), [&](const Tensor& b) { return overlap(a, b); });
      });
      if (shares) {
        complete(other->ticket);
        break;
      }
    }
    collective.ticket = ++last_ticket_;
    collective.tensors = std::move(tensors);
    under_way_.push_back(std::move(collective));
    try {
      start(under_way_.back().works);
    } catch (const std::exception& error) {
      fail(under_way_.back(), error);
    }
    return last_ticket_;
  }

  void complete(Ticket ticket) {
    LLMC_CHECK(failure_.empty(), "%s", failure_.c_str());
    while (!under_way_.empty() && under_way_.front().ticket <= ticket) {
      try {
        for (const auto& work : under_way_.front().works) work->wait();
      } catch (const std::exception& error) {
        fail(under_way_.front(), error);
      }
      under_way_.pop_front();
    }
  }

  [[noreturn]] void fail(const Collective& collective, const std::exception& error) {
    failure_ = describe_failure(collective.operation, collective.what, collective.tensors[0], rank(), size(),
                                "another rank is gone, or did not take part in time (Gloo: " + words(error) + ")");
    abandon();
    throw_error(__FILE__, __LINE__, "%s", failure_.c_str());
  }

  // Until all works have ended, well or not, Gloo's threads may write to the memory of their tensors.
  void abandon() {
    for (const Collective& collective : under_way_) {
      for (const auto& work : collective.works) {
        try {
          work->wait();
        } catch (const std::exception&) {
        }
      }
    }
    under_way_.clear();
  }

  c10::intrusive_ptr<c10d::Backend> backend_;
  std::deque<Collective> under_way_;
  Ticket last_ticket_ = 0;
  std::string failure_;  // the first one, of which all later calls speak
};

// A communicator as Python has it: it checks torch tensors, and keeps them until they were waited for.
class TorchCommunicator final : public Communicator {
 public:
  TorchCommunicator(std::shared_ptr<Communicator> comm, Device device) : device_(device), comm_(std::move(comm)) {}

  int rank() const override { return comm_->rank(); }
  int size() const override { return comm_->size(); }
  void attach(void* stream) override { comm_->attach(stream); }
  Ticket all_reduce_average(Tensor x, const std::string& what) override { return comm_->all_reduce_average(x, what); }
  Ticket all_reduce_sum(Tensor x, const std::string& what) override { return comm_->all_reduce_sum(x, what); }
  Ticket reduce_scatter_average(Tensor x, const std::string& what) override {
    return comm_->reduce_scatter_average(x, what);
  }
  Ticket all_gather(Tensor x, Tensor own, const std::string& what) override { return comm_->all_gather(x, own, what); }

  void wait(Ticket ticket) override {
    comm_->wait(ticket);
    forget(ticket);
  }

  void finish(Ticket ticket) override {
    comm_->finish(ticket);
    forget(ticket);
  }

  Ticket all_reduce_average(const at::Tensor& x, const std::string& what) {
    return keep(all_reduce_average(check("all_reduce_average", x), what), x);
  }

  Ticket all_reduce_sum(const at::Tensor& x, const std::string& what) {
    return keep(all_reduce_sum(check("all_reduce_sum", x), what), x);
  }

  Ticket reduce_scatter_average(const at::Tensor& x, const std::string& what) {
    const Tensor view = check("reduce_scatter_average", x);
    check_slices("reduce_scatter_average", view);
    return keep(reduce_scatter_average(view, what), x);
  }

  Ticket all_gather(const at::Tensor& x, const at::Tensor& own, const std::string& what) {
    const Tensor view = check("all_gather", x);
    check_slices("all_gather", view);
    Arguments arguments("all_gather");
    const Tensor slice = arguments.in("own", own, "any", "N");
    LLMC_CHECK(arguments.device() == device_ && slice.dtype == view.dtype && slice.numel() * size() == view.numel(),
               "all_gather: own has %" PRId64 " elements, %s, on %s; it must be one of the %d slices of x: %" PRId64
               " elements, %s, on %s",
               slice.numel(), name_of(slice.dtype), name_of(arguments.device()).c_str(), size(), view.numel() / size(),
               name_of(view.dtype), name_of(device_).c_str());
    const char *begin = view.as<char>(), *end = begin + view.bytes(), *own_begin = slice.as<char>();
    LLMC_CHECK(own_begin == begin + rank() * slice.bytes() || own_begin + slice.bytes() <= begin || end <= own_begin,
               "all_gather: own overlaps x, but is not rank %d's slice of it", rank());
    return keep(keep(all_gather(view, slice, what), x), own);
  }

 private:
  Tensor check(const char* operation, const at::Tensor& x) {
    Arguments arguments(operation);
    const Tensor view = arguments.out("x", x, "any", "N");
    LLMC_CHECK(arguments.device() == device_, "%s: x is on %s, it must be on the communicator's device, %s", operation,
               name_of(arguments.device()).c_str(), name_of(device_).c_str());
    return view;
  }

  void check_slices(const char* operation, const Tensor& x) {
    LLMC_CHECK(x.numel() % size() == 0,
               "%s: x has %" PRId64 " elements, it must have a multiple of the number of ranks, %d", operation,
               x.numel(), size());
  }

  Ticket keep(Ticket ticket, const at::Tensor& x) {
    kept_.emplace_back(ticket, x);
    return ticket;
  }

  void forget(Ticket ticket) {
    while (!kept_.empty() && kept_.front().first <= ticket) kept_.pop_front();
  }

  const Device device_;
  std::deque<std::pair<Ticket, at::Tensor>> kept_;
  const std::shared_ptr<Communicator> comm_;  // ends its work before the tensors go
};

// Every Communicator that Python has is one.
TorchCommunicator& for_torch(Communicator& comm) { return static_cast<TorchCommunicator&>(comm); }

}  // namespace

void register_communicators(py::module_& module) {
  using namespace py::literals;
  const py::call_guard<py::gil_scoped_release> no_gil;

  py::class_<Communicator, std::shared_ptr<Communicator>>(
      module, "Communicator", py::module_local(),
      "What the ranks of a run do together; see csrc/comm/communicator.h. All ranks make the same calls in the same "
      "order. Collectives work in place on contiguous tensors, fp32 or bf16, return a ticket at once and run in the "
      "background: do not touch their tensors until wait(ticket). When one fails, all later calls do.")
      .def_property_readonly("rank", &Communicator::rank)
      .def_property_readonly("size", &Communicator::size)
      .def(
          "all_reduce_average",
          [](Communicator& self, const at::Tensor& x, const std::string& what) {
            return for_torch(self).all_reduce_average(x, what);
          },
          no_gil, "x"_a, "what"_a = "", "x = average over the ranks, the same bits on all; `what` names it in errors.")
      .def(
          "all_reduce_sum",
          [](Communicator& self, const at::Tensor& x, const std::string& what) {
            return for_torch(self).all_reduce_sum(x, what);
          },
          no_gil, "x"_a, "what"_a = "", "x = sum over the ranks, the same bits on all.")
      .def(
          "reduce_scatter_average",
          [](Communicator& self, const at::Tensor& x, const std::string& what) {
            return for_torch(self).reduce_scatter_average(x, what);
          },
          no_gil, "x"_a, "what"_a = "",
          "Of x, cut into one slice per rank: this rank's slice = average over the ranks, the others are undefined.")
      .def(
          "all_gather",
          [](Communicator& self, const at::Tensor& x, const at::Tensor& own, const std::string& what) {
            return for_torch(self).all_gather(x, own, what);
          },
          no_gil, "x"_a, "own"_a, "what"_a = "",
          "x = the slices `own` of all ranks; own may be this rank's slice of x, or lie apart.")
      .def("wait", &Communicator::wait, no_gil, "ticket"_a,
           "What the device does from here on sees the result of that collective and of those before it.")
      .def("finish", &Communicator::finish, no_gil, "ticket"_a,
           "The host waits for that collective and those before it, no longer than the time-out.");

  module.def(
      "gloo_communicator",
      [](const std::string& group_name) -> std::shared_ptr<Communicator> {
        return std::make_shared<TorchCommunicator>(std::make_shared<Gloo>(group_name), Device{});
      },
      no_gil, "group_name"_a, "The ranks of the torch.distributed process group with that name, on CPUs through Gloo.");
  module.def(
      "nccl_unique_id", [] { return py::bytes(nccl_unique_id()); },
      "128 bytes, made by rank 0 for all ranks of one nccl_communicator().");
  module.def(
      "nccl_communicator",
      [](const std::string& unique_id, int rank, int size, int device,
         double timeout_seconds) -> std::shared_ptr<Communicator> {
        return std::make_shared<TorchCommunicator>(
            make_nccl_communicator(unique_id, rank, size, device, timeout_seconds), Device{true, device});
      },
      no_gil, "unique_id"_a, "rank"_a, "size"_a, "device"_a, "timeout_seconds"_a,
      "Ranks on GPUs through NCCL; returns when all ranks have called it. timeout_seconds: the longest wait for "
      "another "
      "rank, here and in its collectives.");
}

}  // namespace llmc::bindings
