// Everything.
#pragma once

#include "phalanx/activation.h"
#include "phalanx/dtype.h"
#include "phalanx/ep.h"
#include "phalanx/gemm.h"
#include "phalanx/gemm_bf16.h"
#include "phalanx/group.h"
#include "phalanx/grouped.h"
#include "phalanx/moe.h"
#include "phalanx/quantize.h"
#include "phalanx/status.h"
#include "phalanx/stream.h"
#include "phalanx/tensor.h"
#include "phalanx/version.h"
