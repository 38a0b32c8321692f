// Stands in for the CUDA toolkit's header in a host run: what a kernel's source needs to be compiled as plain C++.
// nvcc includes its own without being asked; the build does so with -include.
#pragma once

#include "../block.h"
#include "../warp.h"
#include "../atomics.h"
#include "../arithmetic.h"
