// The NCCL communicator of a build without CUDA.
#include "comm/nccl.h"
#include "core/check.h"

namespace llmc {
namespace {

[[noreturn]] void throw_no_cuda() {
  throw_error(__FILE__, __LINE__,
              "this build of llmc has no CUDA backend, and NCCL is part of it: ranks on CPUs use Gloo");
}

}  // namespace

std::string nccl_unique_id() { throw_no_cuda(); }

std::shared_ptr<Communicator> make_nccl_communicator(const std::string&, int, int, int, double) { throw_no_cuda(); }

}  // namespace llmc
