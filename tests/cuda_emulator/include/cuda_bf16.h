// SPDX-License-Identifier: Apache-2.0
// Stands where CUDA's header of this name would: emulator.h holds what kernels use of it.
#pragma once
