// A launch from a file, as a program: ThreadSanitizer wants to be there from the start.
//
//   program FUNCTION FILE THREADS

#include "on_cpu.cpp"
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>

static std::vector<double> read(FILE *file)
{
    i64 bytes = 0;
    if (fread(&bytes, 8, 1, file) != 1)
        exit(3);
    std::vector<double> values(bytes / 8 + 1);
    if (fread(values.data(), 1, bytes, file) != (size_t)bytes)
        exit(3);
    return values;
}

int main(int, char **words)
{
    FILE *file = fopen(words[2], "rb");
    auto sizes = read(file), pictures = read(file), rows = read(file), tables = read(file);
    auto settings = read(file);
    const i64 count = (i64)sizes[0];
    std::vector<double> images((i64)sizes[1] / 8 + 1), scratch((i64)sizes[2] / 8 + 2);
    std::vector<u8> drawn(count);
    using Run = void (
        unsigned, unsigned, const void *, i64, const void *, const void *, const void *, u8 *, u8 *,
        u8 *);
    Run *run = (Run *)dlsym(RTLD_DEFAULT, words[1]);
    if (!run)
        exit(4);
    run(1, (unsigned)atoi(words[3]), pictures.data(), count, rows.data(), tables.data(),
        settings.data(), (u8 *)images.data(), drawn.data(), (u8 *)scratch.data());
}
