# SPDX-License-Identifier: MIT
# What the CUDA kernels consist of, for the device (CMakeLists.txt) and for the emulation (tests/csrc).
set(LMTFAST_CUDA_SOURCES
    compose.cu
    device.cu
    gradient.cu
    margin_cross_entropy.cu
    operator.cu
    pair_norm.cu
    pass.cu
    pass_finish.cu
    prepare.cu
    spectral.cu)
list(TRANSFORM LMTFAST_CUDA_SOURCES PREPEND ${CMAKE_CURRENT_LIST_DIR}/)
# Host code beside them, and the entry points.
set(LMTFAST_CUDA_HOST_SOURCES
    ${CMAKE_CURRENT_LIST_DIR}/circles.cpp ${CMAKE_CURRENT_LIST_DIR}/plan.cpp ${PROJECT_SOURCE_DIR}/csrc/capi/cuda.cpp
    ${PROJECT_SOURCE_DIR}/csrc/capi/cuda_spectral.cpp)
set(LMTFAST_CUDA_BINDINGS ${PROJECT_SOURCE_DIR}/csrc/python/cuda.cpp ${PROJECT_SOURCE_DIR}/csrc/python/cuda_spectral.cpp)
