// The kernels of a .cu file as functions of a shared library; -DKERNELS='"path"' says which file.

#include "on_cpu.h"

// Blocks and threads come before the kernel's own arguments.
template <class P, class R, class T, class S>
static void start(
    void (*kernel)(const P *, i64, const R *, const T *, const S *, u8 *, u8 *, u8 *),
    unsigned blocks, unsigned threads, const void *pictures, i64 count, const void *rows,
    const void *tables, const void *settings, u8 *images, u8 *drawn, u8 *scratch)
{
    on_cpu(blocks, threads, [=] {
        kernel(
            (const P *)pictures, count, (const R *)rows, (const T *)tables, (const S *)settings,
            images, drawn, scratch);
    });
}

#define KERNEL(name)                                                                               \
    extern "C" void name##_on_cpu(                                                                 \
        unsigned blocks, unsigned threads, const void *pictures, i64 count, const void *rows,      \
        const void *tables, const void *settings, u8 *images, u8 *drawn, u8 *scratch)              \
    {                                                                                              \
        start(                                                                                     \
            name, blocks, threads, pictures, count, rows, tables, settings, images, drawn,         \
            scratch);                                                                              \
    }

#include KERNELS
