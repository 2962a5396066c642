// First on the include path of simulated kernels: NVIDIA's own header, then what nvcc would have built in.
#pragma once

#include_next <cuda_runtime.h>

#include "cudasim/device.h"
