// Stands in for the CUDA toolkit's header where there is none: TensorRT's headers want these two handles from it and nothing else.
#pragma once

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
