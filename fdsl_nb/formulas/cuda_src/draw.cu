// Canonical images of the eight published families, equal to `formula.render` to the pixel.
//
// A block draws one picture at a time and takes the next when it is done. Real numbers meet only
// + - * /, comparisons, floor and rounding to a whole number, in the order of the numba kernels;
// compiled without fused multiply-add they give the same bits. Where threads may meet in a pixel,
// the result does not depend on who comes last: see each family.
//
// All records have fields of eight bytes; fdsl_nb/formulas/cuda.py writes them in the same order.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// Threads may write the same value to one pixel. on_cpu.h makes that a relaxed atomic store.
#ifndef STORE
#define STORE(place, value) (*(place) = (value))
#endif

enum { CATEGORY = 0, INSTANCE = 1 };

// ---------------------------------------------------------------- random numbers (core/01_rng)

struct Stream {
    u64 seed;
    u32 purpose, c, k;
};

// Word `i` of a stream: Philox4x32-10 of its block, one of four lanes.
__device__ u32 stream_word(Stream s, u64 i)
{
    u32 c0 = (u32)(i >> 2), c1 = s.purpose, c2 = s.c, c3 = s.k;
    u32 k0 = (u32)s.seed, k1 = (u32)(s.seed >> 32);
    for (int round = 0; round < 10; round++) {
        u64 p0 = (u64)0xD2511F53u * c0, p1 = (u64)0xCD9E8D57u * c2;
        c0 = (u32)(p1 >> 32) ^ c1 ^ k0;
        c2 = (u32)(p0 >> 32) ^ c3 ^ k1;
        c1 = (u32)p1;
        c3 = (u32)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    u32 lane = (u32)i & 3;
    return lane == 0 ? c0 : lane == 1 ? c1 : lane == 2 ? c2 : c3;
}

__device__ double unit(u32 word) { return (word >> 8) * (1.0 / 16777216.0); }

__device__ i64 below(u32 word, i64 n) { return (i64)(((u64)word * (u64)n) >> 32); }

__device__ i64 randint(u32 word, i64 a, i64 b) { return a + below(word, b - a + 1); }

// ------------------------------------------------------------------------ drawing (core/02_raster)

__device__ void put(u8 *image, i64 size, i64 x, i64 y, u8 grey)
{
    if (0 <= x && x < size && 0 <= y && y < size)
        STORE(image + y * size + x, grey);
}

// The pixels from (x, y) to before (xe, ye), as Pillow steps.
__device__ void walk(u8 *image, int size, int x, int y, int xe, int ye, u8 grey)
{
    int left = x < xe ? x : xe, right = x < xe ? xe : x;
    int top = y < ye ? y : ye, bottom = y < ye ? ye : y;
    if (right < 0 || left >= size || bottom < 0 || top >= size)
        return;
    int sx = xe >= x ? 1 : -1, sy = ye >= y ? 1 : -1;
    int major = right - left, minor = bottom - top;
    int major_x = sx, major_y = 0, minor_x = 0, minor_y = sy;
    if (minor >= major) {
        int longer = minor;
        minor = major, major = longer;
        major_x = 0, major_y = sy, minor_x = sx, minor_y = 0;
    }
    int error = 2 * minor - major;
    for (int i = 0; i < major; i++) {
        put(image, size, x, y, grey);
        int step = error >= 0;
        x += major_x + step * minor_x;
        y += major_y + step * minor_y;
        error += 2 * minor - step * 2 * major;
    }
}

__device__ const u8 PERMUTATION[256] = {
    151, 160, 137, 91, 90, 15, 131, 13, 201, 95, 96, 53, 194, 233, 7, 225,
    140, 36, 103, 30, 69, 142, 8, 99, 37, 240, 21, 10, 23, 190, 6, 148,
    247, 120, 234, 75, 0, 26, 197, 62, 94, 252, 219, 203, 117, 35, 11, 32,
    57, 177, 33, 88, 237, 149, 56, 87, 174, 20, 125, 136, 171, 168, 68, 175,
    74, 165, 71, 134, 139, 48, 27, 166, 77, 146, 158, 231, 83, 111, 229, 122,
    60, 211, 133, 230, 220, 105, 92, 41, 55, 46, 245, 40, 244, 102, 143, 54,
    65, 25, 63, 161, 1, 216, 80, 73, 209, 76, 132, 187, 208, 89, 18, 169,
    200, 196, 135, 130, 116, 188, 159, 86, 164, 100, 109, 198, 173, 186, 3, 64,
    52, 217, 226, 250, 124, 123, 5, 202, 38, 147, 118, 126, 255, 82, 85, 212,
    207, 206, 59, 227, 47, 16, 58, 17, 182, 189, 28, 42, 223, 183, 170, 213,
    119, 248, 152, 2, 44, 154, 163, 70, 221, 153, 101, 155, 167, 43, 172, 9,
    129, 22, 39, 253, 19, 98, 108, 110, 79, 113, 224, 232, 178, 185, 112, 104,
    218, 246, 97, 228, 251, 34, 242, 193, 238, 210, 144, 12, 191, 179, 162, 241,
    81, 51, 145, 235, 249, 14, 239, 107, 49, 192, 214, 31, 181, 199, 106, 157,
    184, 84, 204, 176, 115, 121, 50, 45, 127, 4, 150, 254, 138, 236, 205, 93,
    222, 114, 67, 29, 24, 72, 243, 141, 128, 195, 78, 66, 215, 61, 156, 180,
};

__device__ float slope(int h, float d) { return h & 8 ? -d : d * (float)((h & 7) + 1); }

// One-octave Perlin noise of 0 ≤ x on a line.
__device__ float perlin(float x)
{
    int whole = (int)x;
    float t = x - (float)whole;
    int i = whole & 1023;
    float blend = t * t * t * (t * (t * 6.0f - 15.0f) + 10.0f);
    float left = slope(PERMUTATION[i & 255], t);
    float right = slope(PERMUTATION[(i + 1) & 255], t - 1.0f);
    return (left + blend * (right - left)) * 0.4f;
}

// ------------------------------------------------------- rcdb, visualatom (formulas/02_contours)

struct ContourPicture {
    i64 row, c, k;  // of `classes`; class and instance, which address the stream
};

struct ContourClass {
    i64 vertices, lines, table;  // the last: where its corner table begins in `tables`
    double noise, drift, radius, oval_x, oval_y, start_h, start_w;
};

struct ContourSettings {
    u64 seed;
    i64 size, background, greys, start_first, start_range, radius_min, redraws_oval, most_vertices;
    double gain, oval_max;
};

enum { FIRST_WORD = 8, SHARED_VERTICES = 1024 };

// What instances k > 0 draw anew.
__device__ void new_instance(ContourClass &a, const ContourSettings &s, Stream stream)
{
    u64 word = 0;
    if (s.redraws_oval) {
        a.oval_x = 1.0 + (s.oval_max - 1.0) * unit(stream_word(stream, word++));
        a.oval_y = 1.0 + (s.oval_max - 1.0) * unit(stream_word(stream, word++));
        a.radius = (double)randint(stream_word(stream, word++), s.radius_min, s.radius_min + 100);
    }
    i64 h = randint(stream_word(stream, word++), -s.start_range, s.start_range);
    i64 w = randint(stream_word(stream, word++), -s.start_range, s.start_range);
    a.start_h = (double)(s.size + h) / 2.0;
    a.start_w = (double)(s.size + w) / 2.0;
}

// A thread bends its corners and draws the edges that end in them. One line has one grey, so its
// edges may come in any order; lines cover one another, so a barrier stands between two of them.
extern "C" __global__ void draw_contours(
    const ContourPicture *pictures, i64 count, const ContourClass *classes, const double *tables,
    const ContourSettings *settings, u8 *images, u8 *drawn, u8 *scratch)
{
    __shared__ double shared_x[SHARED_VERTICES], shared_y[SHARED_VERTICES];
    __shared__ int shared_column[SHARED_VERTICES], shared_row[SHARED_VERTICES];
    const ContourSettings s = *settings;
    const int me = threadIdx.x, threads = blockDim.x, size = (int)s.size;
    double *xs = shared_x, *ys = shared_y;
    int *columns = shared_column, *rows = shared_row;
    if (s.most_vertices > SHARED_VERTICES) {
        xs = (double *)(scratch + 24 * s.most_vertices * blockIdx.x);
        ys = xs + s.most_vertices;
        columns = (int *)(ys + s.most_vertices);
        rows = columns + s.most_vertices;
    }
    for (i64 p = blockIdx.x; p < count; p += gridDim.x) {
        const ContourPicture picture = pictures[p];
        const Stream stream = {s.seed, INSTANCE, (u32)picture.c, (u32)picture.k};
        ContourClass a = classes[picture.row];
        if (picture.k)
            new_instance(a, s, stream);
        const int n = (int)a.vertices;
        const double *cosine = tables + a.table, *sine = cosine + n;
        const double *wave_1 = sine + n, *wave_2 = wave_1 + n;
        const double inside_x = s.start_first ? a.start_w : 0.0, outside_x = a.start_w - inside_x;
        const double inside_y = s.start_first ? a.start_h : 0.0, outside_y = a.start_h - inside_y;
        u8 *image = images + p * s.size * s.size;
        for (int i = me; i < size * size; i += threads)
            image[i] = (u8)s.background;
        for (int v = me; v < n; v += threads) {
            xs[v] = cosine[v] * a.radius * a.oval_x + inside_x;
            ys[v] = sine[v] * a.radius * a.oval_y + inside_y;
        }
        for (i64 line = 0; line < a.lines; line++) {
            const u64 first = FIRST_WORD + line * (2 * n + 1);
            const i64 shade = below(stream_word(stream, first), s.greys);
            const u8 grey = (u8)(shade < 255 ? shade : 255);
            for (int v = me; v < n; v += threads) {
                const float place_x = (float)(unit(stream_word(stream, first + 1 + v)) * 10000.0);
                const float place_y = (float)(unit(stream_word(stream, first + 1 + n + v)) * 10000.0);
                const double noise_x = (double)perlin(place_x), noise_y = (double)perlin(place_y);
                const double across = noise_x * a.noise * s.gain - a.noise - wave_1[v] - wave_2[v];
                const double down = noise_y * a.noise * s.gain - a.noise - wave_1[v] - wave_2[v];
                xs[v] -= cosine[v] * (across - a.drift);
                ys[v] -= sine[v] * (down - a.drift);
                columns[v] = (int)(xs[v] + outside_x);
                rows[v] = (int)(ys[v] + outside_y);
            }
            __syncthreads();  // all corners are where this line has them
            for (int v = me; v < n; v += threads) {
                const int before = v ? v - 1 : n - 1;
                walk(image, size, columns[before], rows[before], columns[v], rows[v], grey);
            }
            if (me == 0)
                put(image, size, columns[n - 1], rows[n - 1], grey);
            __syncthreads();  // the line is drawn: the next may cover it, and move the corners
        }
        if (me == 0)
            drawn[p] = 1;
    }
}

// ------------------------------------- fractaldb, ofdb2d, onepfrac (formulas/03_chaos, 05_ifs)

struct PlanePicture {
    i64 first, maps, c, k, flip;  // its maps in `systems`; the address of its patches
};

struct PlaneSettings {
    u64 seed;
    i64 size, points, padding, patches, filled, coloured;
};

enum { STRIDE = 256 };  // points between two that are remembered

struct Place {
    double x, y;
};

struct Extent {
    double low, high;
};

// Where map `j` of a system (rows a b c d e f limit) leads; below the maps is one that stands still.
__device__ Place moved(const double *system, int maps, int j, Place at)
{
    const double *m = system + 7 * j;
    const bool map = j < maps;
    const double a = map ? m[0] : 1.0, b = map ? m[1] : 0.0, e = map ? m[4] : 0.0;
    const double c = map ? m[2] : 0.0, d = map ? m[3] : 1.0, f = map ? m[5] : 0.0;
    Place to;
    to.x = at.x * a + at.y * b + e;
    to.y = at.x * c + at.y * d + f;
    return to;
}

__device__ void extend(Extent &e, double v)
{
    if (v < e.low)
        e.low = v;
    if (v > e.high)
        e.high = v;
}

// Plays `points` points; remembers every STRIDE-th; says where x and y first are not a number.
__device__ Place play(
    const double *system, int maps, const u8 *choices, i64 points, Place *remembered,
    Extent &across, Extent &up, i64 &lost_x, i64 &lost_y)
{
    Place at = {0.0, 0.0};
    across.low = across.high = up.low = up.high = 0.0;
    lost_x = lost_y = points;
    for (i64 i = 0; i < points; i++) {
        if (i)
            at = moved(system, maps, choices[i - 1], at);
        if (i % STRIDE == 0)
            remembered[i / STRIDE] = at;
        extend(across, at.x);
        extend(up, at.y);
        if (at.x != at.x && lost_x == points)
            lost_x = i;
        if (at.y != at.y && lost_y == points)
            lost_y = i;
    }
    return at;
}

// As x86 converts what does not fit: far outside every picture.
__device__ i64 whole(double v)
{
    return v > -2147483649.0 && v < 2147483648.0 ? (i64)(int)v : -2147483647 - 1;
}

__device__ i64 to_pixel(double v, Extent e, const PlaneSettings &s)
{
    if (e.low == e.high)
        return 0;
    return whole((v - e.low) / (e.high - e.low) * (double)(s.size - 2 * s.padding) + (double)s.padding);
}

// The latest point that covers a pixel decides it, whoever writes first: bits 1 … 31 of `last` are
// the point's number plus one, bit 0 says whether it lights the pixel.
__device__ void cover(u32 *last, i64 size, i64 x, i64 y, i64 point, bool lit)
{
    if (0 <= x && x < size && 0 <= y && y < size)
        atomicMax(last + y * size + x, (u32)(point + 1) << 1 | lit);
}

__device__ void cover_point(u32 *last, const PlaneSettings &s, Stream stream, i64 i, i64 x, i64 y)
{
    if (!s.patches) {
        cover(last, s.size, x, y, i, true);
        return;
    }
    const i64 mask = s.filled ? 511 : 1 + below(stream_word(stream, i), 511);
    for (int row = 0; row < 3; row++)
        for (int column = 0; column < 3; column++)
            cover(last, s.size, x + 1 + column, y + 1 + row, i, mask & (256 >> (3 * row + column)));
}

// The game is one chain of roundings, so thread 0 plays it, and remembers places on the way. From
// these all threads play parts of it again, the same to the bit, and cover pixels.
extern "C" __global__ void draw_plane(
    const PlanePicture *pictures, i64 count, const double *systems, const u32 *tables,
    const PlaneSettings *settings, u8 *images, u8 *drawn, u8 *scratch)
{
    __shared__ Extent across, up;
    __shared__ i64 points;
    const PlaneSettings s = *settings;
    const int me = threadIdx.x, threads = blockDim.x;
    const i64 pixels = s.size * s.size, parts = (s.points + STRIDE - 1) / STRIDE;
    // remembered places, then the covers of the pixels, then the choices of maps
    const i64 share = 16 * parts + 4 * pixels + (s.points + 15) / 16 * 16;
    Place *remembered = (Place *)(scratch + (share + 15) / 16 * 16 * blockIdx.x);
    u32 *last = (u32 *)(remembered + parts);
    u8 *choices = (u8 *)(last + pixels);
    const u32 *palette = tables + s.points;
    for (i64 p = blockIdx.x; p < count; p += gridDim.x) {
        const PlanePicture picture = pictures[p];
        const Stream stream = {s.seed, INSTANCE, (u32)picture.c, (u32)picture.k};
        const double *system = systems + 7 * picture.first;
        const int maps = (int)picture.maps;
        for (i64 i = me; i < pixels; i += threads)
            last[i] = 0;
        for (i64 i = me; i < s.points; i += threads) {
            int j = 0;
            for (int m = 0; m < maps; m++)
                j += unit(tables[i]) > system[7 * m + 6];
            choices[i] = (u8)j;
        }
        __syncthreads();  // all choices are made
        if (me == 0) {
            i64 n = s.points, lost_x, lost_y;
            Place end = play(system, maps, choices, n, remembered, across, up, lost_x, lost_y);
            if (!(end.x - end.x == 0.0 && end.y - end.y == 0.0)) {
                if (lost_x < n)
                    n = lost_x < 100 ? 0 : lost_x - 100;
                if (lost_y < n)
                    n = lost_y < 100 ? 0 : lost_y - 100;
                play(system, maps, choices, n, remembered, across, up, lost_x, lost_y);
            }
            points = n;
        }
        __syncthreads();  // places and extents are known
        for (i64 part = me; part * STRIDE < points; part += threads) {
            Place at = remembered[part];
            const i64 first = part * STRIDE;
            const i64 end = first + STRIDE < points ? first + STRIDE : points;
            for (i64 i = first; i < end; i++) {
                if (i > first)
                    at = moved(system, maps, choices[i - 1], at);
                cover_point(last, s, stream, i, to_pixel(at.x, across, s), to_pixel(at.y, up, s));
            }
        }
        __syncthreads();  // every pixel knows its latest point
        u8 *image = images + p * pixels * (s.coloured ? 3 : 1);
        for (i64 i = me; i < pixels; i += threads) {
            i64 row = i / s.size, column = i % s.size;
            if (!(picture.flip & 1))
                row = s.size - 1 - row;
            if (picture.flip & 2)
                column = s.size - 1 - column;
            const u32 key = last[row * s.size + column];
            const u32 ink = key & 1 ? 1 + ((key >> 1) - 1) % 128 : 0;
            if (!s.coloured)
                image[i] = ink ? 127 : 0;
            else
                for (int channel = 0; channel < 3; channel++)
                    image[3 * i + channel] = (u8)(palette[ink] >> (8 * channel));
        }
        if (me == 0)
            drawn[p] = points > 0;
        __syncthreads();  // the picture is painted: its covers may be cleared
    }
}

// ------------------------------------- exfractaldb, mvfractaldb, ofdb3d (formulas/06_ifs3d)

struct SpacePicture {
    i64 first, maps, c, row;  // its system in `systems`: weighted, then as it is; the cloud's address
    double camera[9];  // right, up, forward
};

struct SpaceSettings {
    u64 seed;
    i64 size, points, point_size;
    double half_side, near, far;
};

// Plays a cloud [3, n]; false where it runs off or stays on one point.
__device__ bool play_space(
    const double *system, const u8 *choices, i64 n, double *cloud, Extent &extent)
{
    double x = 0.0, y = 0.0, z = 0.0;
    for (i64 i = 0; i < n; i++) {
        const double *m = system + 13 * choices[i];
        const double to_x = x * m[0] + y * m[1] + z * m[2] + m[9];
        const double to_y = x * m[3] + y * m[4] + z * m[5] + m[10];
        const double to_z = x * m[6] + y * m[7] + z * m[8] + m[11];
        x = to_x, y = to_y, z = to_z;
        if (!(x - x == 0.0 && y - y == 0.0 && z - z == 0.0))
            return false;
        if (i == 0)
            extent.low = extent.high = x;
        extend(extent, x);
        extend(extent, y);
        extend(extent, z);
        cloud[i] = x, cloud[n + i] = y, cloud[2 * n + i] = z;
    }
    return extent.high - extent.low > 0.0;
}

// A place on the picture, to the 256th part of a pixel.
__device__ float on_picture(const float *axis, float x, float y, float z, float scale, float side)
{
    float v = (scale * (axis[0] * x + axis[1] * y + axis[2] * z) * 0.5f + 0.5f) * side;
    return rintf(v * 256.0f) * (1.0f / 256.0f);
}

__device__ void photograph(
    u8 *image, const SpaceSettings &s, const float *camera, float x, float y, float z)
{
    const float side = (float)s.size, corner = (float)(0.5 - 0.5 * (double)s.point_size);
    const float *forward = camera + 6;
    const float depth = forward[0] * x + forward[1] * y + forward[2] * z + 4.0f;
    const float scale = 2.41421366f / depth;  // 1 / tan(45° / 2)
    const float across = on_picture(camera, x, y, z, scale, side);
    const float up = on_picture(camera + 3, x, y, z, scale, side);
    const bool deep = depth >= (float)s.near && depth <= (float)s.far;
    if (!(deep && across >= 0.0f && across < side && up >= 0.0f && up < side))
        return;
    const i64 left = (i64)floorf(across + corner), bottom = (i64)floorf(up + corner);
    for (i64 row = bottom; row < bottom + s.point_size; row++)
        for (i64 column = left; column < left + s.point_size; column++)
            put(image, s.size, column, row, 255);
}

// Thread 0 plays, three threads sum (both are chains of roundings), all threads place the points.
// Every point writes 255, so that their order does not matter.
extern "C" __global__ void draw_space(
    const SpacePicture *pictures, i64 count, const double *systems, const u32 *tables,
    const SpaceSettings *settings, u8 *images, u8 *drawn, u8 *scratch)
{
    __shared__ Extent extent;
    __shared__ double middle[3];
    __shared__ int there;
    const SpaceSettings s = *settings;
    const int me = threadIdx.x, threads = blockDim.x;
    const i64 n = s.points - 1;
    double *cloud = (double *)(scratch + (24 * n + (n + 15) / 16 * 16) * blockIdx.x);
    u8 *choices = (u8 *)(cloud + 3 * n);
    for (i64 p = blockIdx.x; p < count; p += gridDim.x) {
        const SpacePicture &picture = pictures[p];
        const Stream stream = {s.seed, CATEGORY, (u32)picture.c, (u32)(picture.row + 1)};
        const double *system = systems + 13 * picture.first;
        const int maps = (int)picture.maps;
        u8 *image = images + p * s.size * s.size;
        for (i64 i = me; i < s.size * s.size; i += threads)
            image[i] = 0;
        for (i64 i = me; i < n; i += threads) {
            const double pick = unit(stream_word(stream, i));
            int j = 0;
            while (j < maps - 1 && pick > system[13 * j + 12])
                j++;
            choices[i] = (u8)j;
        }
        __syncthreads();  // all choices are made, and the picture before is taken
        if (me == 0)
            there = play_space(system, choices, n, cloud, extent) ||
                    play_space(system + 13 * maps, choices, n, cloud, extent);
        __syncthreads();  // the cloud is there
        const double side = 2.0 * s.half_side;
        for (i64 i = me; there && i < 3 * n; i += threads)
            cloud[i] = ((cloud[i] - extent.low) / (extent.high - extent.low)) * side - s.half_side;
        __syncthreads();  // it is stretched to its cube
        for (int axis = me; there && axis < 3; axis += threads) {
            double total = 0.0;
            for (i64 i = 0; i < n; i++)
                total += cloud[axis * n + i];
            middle[axis] = total / (double)(n + 1);
        }
        __syncthreads();  // its middle is known
        float camera[9];
        for (int i = 0; i < 9; i++)
            camera[i] = (float)picture.camera[i];
        for (i64 i = me; there && i < n; i += threads) {
            const float x = (float)(cloud[i] - middle[0]);
            const float y = (float)(cloud[n + i] - middle[1]);
            const float z = (float)(cloud[2 * n + i] - middle[2]);
            photograph(image, s, camera, x, y, z);
        }
        if (me == 0)
            drawn[p] = there;
    }
}

#ifdef KERNEL
KERNEL(draw_contours)
KERNEL(draw_plane)
KERNEL(draw_space)
#endif
