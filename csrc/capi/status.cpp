// SPDX-License-Identifier: MIT
#include "core/status.h"

int64_t lmtfast_abi_version(void) { return LMTFAST_ABI_VERSION; }

const char* lmtfast_last_error(void) { return lmtfast::last_error(); }
