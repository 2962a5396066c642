#include "ops/ops.h"

namespace llmc {

Ops::~Ops() = default;

}  // namespace llmc
