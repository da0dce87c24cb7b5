// What NVIDIA's inference headers need of the CUDA runtime's: two names of types that are only ever pointed to. With this file
// in the search path, the shim and the plugins compile where there is no CUDA toolkit.
#ifndef ACCORDION_CUDA_NAMES_H
#define ACCORDION_CUDA_NAMES_H

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;

#endif
