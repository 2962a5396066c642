// Ranks on NVIDIA GPUs, one process per GPU, through NCCL. Builds without CUDA have the functions too (no_nccl.cpp): they
// throw Error.
#pragma once

#include <memory>
#include <string>

#include "comm/communicator.h"

namespace llmc {

// What the ranks of one communicator find each other by: 128 bytes that rank 0 makes and sends to the others.
std::string nccl_unique_id();

// All ranks call it, and it returns when all have. Collectives are ordered with the legacy default stream until attach().
// timeout_seconds: how long anything here waits for another rank before it gives up. Throws Error if there is no such
// device, or the other ranks do not come in time.
//
// bf16 is rounded to bf16 after each addition, as often as NCCL's choice of algorithm needs; the result has the same bits
// on all ranks.
std::shared_ptr<Communicator> make_nccl_communicator(const std::string& unique_id, int rank, int size, int device,
                                                     double timeout_seconds);

}  // namespace llmc
