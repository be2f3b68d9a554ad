// The training transform of fdsl_nb/data/fast_augment.py for grey images, to the bit: crop, resizing,
// flips, RandAugment, normalisation, erasing. Random numbers are drawn on the CPU, into the records.
//
// A block has one image at a time. In every step a thread writes pixels of its own and reads those
// of the step before, behind a barrier; sums are of whole numbers, so their order does not matter.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

enum { LAYERS = 8, RECTANGLES = 8 };

struct Operation {
    double code, value, bicubic, matrix[6];  // the last of a rotation: from a pixel to its origin
};

struct Rectangle {
    i64 top, left, height, width, filling;  // the last: where it begins in `tables`
};

struct View {
    i64 image, top, left, height, width, bicubic, flip_across, flip_down, operations, erased;
    Operation operation[LAYERS];
    Rectangle rectangle[RECTANGLES];
};

struct ViewSettings {
    i64 height, width, size, floats, noise, taps, fill_red, fill_green, fill_blue;
};

enum {
    NONE, CONTRAST, BRIGHTNESS, COLOR, SHARPNESS, AUTOCONTRAST, EQUALIZE, INVERT, POSTERIZE, SOLARIZE,
    SOLARIZE_ADD, ROTATE, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y
};

__device__ int clamped(int v, int low, int high) { return v < low ? low : v > high ? high : v; }

__device__ u8 byte_of(double v) { return (u8)(v < 0.0 ? 0.0 : v > 255.0 ? 255.0 : v); }

// ------------------------------------------------ resizing: Pillow's fixed point, 22 bits

__device__ double weight(double x, bool bicubic)
{
    x = x < 0.0 ? -x : x;
    if (!bicubic)
        return x < 1.0 ? 1.0 - x : 0.0;
    if (x < 1.0)
        return (1.5 * x - 2.5) * x * x + 1.0;
    if (x < 2.0)
        return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5;
    return 0.0;
}

struct Taps {
    int first, count;
};

// What pixel `i` of `size` is made of, of `length` pixels; the weights into `weights`.
__device__ Taps taps_of(int i, int length, int size, bool bicubic, int *weights)
{
    const double scale = (double)length / (double)size, stretch = scale > 1.0 ? scale : 1.0;
    const double support = (bicubic ? 2.0 : 1.0) * stretch, inverse = 1.0 / stretch;
    const double centre = ((double)i + 0.5) * scale;
    int low = (int)(centre - support + 0.5), high = (int)(centre + support + 0.5);
    low = low < 0 ? 0 : low;
    high = high > length ? length : high;
    double total = 0.0;
    for (int x = low; x < high; x++)
        total += weight(((double)x - centre + 0.5) * inverse, bicubic);
    for (int x = low; x < high; x++) {
        double w = weight(((double)x - centre + 0.5) * inverse, bicubic);
        w = total != 0.0 ? w / total : w;
        weights[x - low] = (int)((w < 0.0 ? -0.5 : 0.5) + w * 4194304.0);
    }
    Taps taps = {low, high - low};
    return taps;
}

__device__ u8 weighed(const u8 *pixels, i64 stride, Taps taps, const int *weights)
{
    int total = 1 << 21;
    for (int k = 0; k < taps.count; k++)
        total += pixels[(taps.first + k) * stride] * weights[k];
    return (u8)clamped(total >> 22, 0, 255);
}

// ----------------------------------------------------------------- operations on colours

__device__ u8 blended(int a, int b, float factor)
{
    const float value = (float)a + factor * (float)(b - a);
    return (u8)(value < 0.0f ? 0.0f : value > 255.0f ? 255.0f : value);
}

__device__ int luma(const u8 *planes, int pixels, int i)
{
    const int r = planes[i], g = planes[pixels + i], b = planes[2 * pixels + i];
    return (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16;
}

__device__ void autocontrast(const u32 *counts, u8 *table)
{
    int low = 0, high = 255;
    while (low < 255 && !counts[low])
        low++;
    while (high > 0 && !counts[high])
        high--;
    if (high <= low)
        return;
    const double scale = 255.0 / (double)(high - low), offset = (double)-low * scale;
    for (int i = 0; i < 256; i++)
        table[i] = (u8)clamped((int)((double)i * scale + offset), 0, 255);
}

__device__ void equalize(const u32 *counts, u8 *table)
{
    int last = 255;
    u32 sum = 0;
    while (last > 0 && !counts[last])
        last--;
    for (int i = 0; i < 256; i++)
        sum += counts[i];
    const u32 step = (sum - counts[last]) / 255;
    if (!step)
        return;
    u32 n = step / 2;
    for (int i = 0; i < 256; i++) {
        table[i] = (u8)(n / step < 255 ? n / step : 255);
        n += counts[i];
    }
}

// What an operation makes of each value of a channel.
__device__ void make_table(int code, double value, const u32 *counts, int mean, u8 *table)
{
    for (int i = 0; i < 256; i++)
        table[i] = (u8)i;
    if (code == AUTOCONTRAST)
        autocontrast(counts, table);
    else if (code == EQUALIZE)
        equalize(counts, table);
    for (int i = 0; i < 256; i++) {
        if (code == CONTRAST || code == BRIGHTNESS)
            table[i] = blended(code == CONTRAST ? mean : 0, i, (float)value);
        else if (code == POSTERIZE && value < 8.0)
            table[i] = (u8)(i & ~((1 << (8 - (int)value)) - 1));
        else if (code == INVERT || (code == SOLARIZE && (double)i >= value))
            table[i] = (u8)(255 - i);
        else if (code == SOLARIZE_ADD && i < 128)
            table[i] = (u8)clamped(i + (int)value, 0, 255);
    }
}

__device__ u8 sharpened(const u8 *plane, int size, int y, int x, float factor)
{
    const u8 *at = plane + y * size + x;
    if (y == 0 || x == 0 || y == size - 1 || x == size - 1)
        return *at;
    int ring = at[-size - 1] + at[-size] + at[-size + 1] + at[-1] + at[1];
    ring += at[size - 1] + at[size] + at[size + 1];
    const int smooth = (2 * (ring + 5 * at[0]) + 13) / 26;
    return blended(smooth, at[0], factor);
}

// -------------------------------------- operations on positions: Pillow's affine transform

__device__ double cubic(double a, double b, double c, double d, double t)
{
    const double p2 = -a + c, p3 = 2.0 * (a - b) + c - d, p4 = -a + b - c + d;
    return b + t * (p2 + t * (p3 + t * p4));
}

// The value at `at` of a line of n pixels, `stride` apart.
__device__ double between(const u8 *line, int n, int stride, double at, bool bicubic)
{
    const int i = (int)floor(at);
    const double t = at - (double)i;
    const double b = line[clamped(i, 0, n - 1) * stride], c = line[clamped(i + 1, 0, n - 1) * stride];
    if (!bicubic)
        return b + (c - b) * t;
    const double a = line[clamped(i - 1, 0, n - 1) * stride];
    const double d = line[clamped(i + 2, 0, n - 1) * stride];
    return cubic(a, b, c, d, t);
}

// A pixel of a plane whose lines slide along themselves; -1 where it comes from outside.
__device__ int slid(const u8 *plane, int size, int y, int x, const Operation &o, bool bicubic)
{
    const int code = (int)o.code;
    const bool upright = code != SHEAR_Y && code != TRANSLATE_Y;
    const bool shear = code == SHEAR_X || code == SHEAR_Y;
    const double slope = shear ? o.value : 0.0, offset = shear ? 0.0 : o.value * (double)size;
    const int line = upright ? y : x, place = upright ? x : y;
    const double shift = slope * ((double)line + 0.5);
    const double from = (((double)place + 0.5) + shift) + offset;
    if (from < 0.0 || from >= (double)size)
        return -1;
    const u8 *pixels = plane + (upright ? line * size : line);
    return byte_of(between(pixels, size, upright ? 1 : size, from - 0.5, bicubic));
}

// The same of a plane turned about its middle.
__device__ int turned(const u8 *plane, int size, int y, int x, const Operation &o, bool bicubic)
{
    const double *m = o.matrix, px = (double)x + 0.5, py = (double)y + 0.5;
    const double u = m[0] * px + m[1] * py + m[2], v = m[3] * px + m[4] * py + m[5];
    if (u < 0.0 || u >= (double)size || v < 0.0 || v >= (double)size)
        return -1;
    const double across = u - 0.5, down = v - 0.5;
    const int j = (int)floor(down);
    const double t = down - (double)j;
    double rows[4];
    for (int r = 0; r < 4; r++) {
        const u8 *line = plane + clamped(j - 1 + r, 0, size - 1) * size;
        rows[r] = between(line, size, 1, across, bicubic);
    }
    if (bicubic)
        return byte_of(cubic(rows[0], rows[1], rows[2], rows[3], t));
    return byte_of(rows[1] + (rows[2] - rows[1]) * t);
}

__device__ int moved(const u8 *plane, int size, int y, int x, const Operation &o, bool bicubic)
{
    if ((int)o.code != ROTATE)
        return slid(plane, size, y, x, o, bicubic);
    return o.value == 0.0 ? plane[y * size + x] : turned(plane, size, y, x, o, bicubic);
}

// --------------------------------------------------------------------------------- the whole

extern "C" __global__ void augment(
    const View *views, i64 count, const u8 *pictures, const float *tables,
    const ViewSettings *settings, u8 *images, u8 *drawn, u8 *scratch)
{
    __shared__ u32 counts[3][256];
    __shared__ u8 lookup[3][256];
    __shared__ u32 total;
    const ViewSettings s = *settings;
    const int me = threadIdx.x, threads = blockDim.x;
    const int size = (int)s.size, pixels = size * size, taps = (int)s.taps;
    const int fill[3] = {(int)s.fill_red, (int)s.fill_green, (int)s.fill_blue};
    // weights of each pixel, an image resized across, planes before and after an operation
    const i64 share = 4 * s.taps * s.size + s.height * s.size + 6 * s.size * s.size;
    int *weights = (int *)(scratch + (share + 15) / 16 * 16 * blockIdx.x);
    u8 *half = (u8 *)(weights + taps * size);
    u8 *planes = half + s.height * s.size, *others = planes + 3 * pixels;
    for (i64 p = blockIdx.x; p < count; p += gridDim.x) {
        const View &view = views[p];
        const bool bicubic = view.bicubic;
        const int height = (int)view.height, width = (int)view.width;
        const u8 *from = pictures + (view.image * s.height + view.top) * s.width + view.left;
        for (int i = me; i < size; i += threads) {
            int *w = weights + taps * i;
            const Taps t = taps_of(i, width, size, bicubic, w);
            const int to = view.flip_across ? size - 1 - i : i;
            for (int y = 0; y < height; y++)
                half[(i64)y * size + to] = weighed(from + y * s.width, 1, t, w);
        }
        __syncthreads();  // all columns are there, and the image before is done
        for (int i = me; i < size; i += threads) {
            int *w = weights + taps * i;
            const Taps t = taps_of(i, height, size, bicubic, w);
            const int to = view.flip_down ? size - 1 - i : i;
            for (int x = 0; x < size; x++)
                planes[to * size + x] = weighed(half + x, size, t, w);
        }
        __syncthreads();  // all rows are there
        int channels = 1;
        for (int n = 0; n < view.operations; n++) {
            const Operation &o = view.operation[n];
            const int code = (int)o.code;
            const bool smooth = o.bicubic > 0.0;
            if (code >= ROTATE || code == SHARPNESS) {
                const bool coloured = fill[0] != fill[1] || fill[0] != fill[2];
                const int out = code >= ROTATE && coloured ? 3 : channels;
                for (int i = me; i < out * pixels; i += threads) {
                    const int c = i / pixels, y = i % pixels / size, x = i % size;
                    const u8 *plane = planes + (channels == 3 ? c * pixels : 0);
                    if (code == SHARPNESS)
                        others[i] = sharpened(plane, size, y, x, (float)o.value);
                    else {
                        const int value = moved(plane, size, y, x, o, smooth);
                        others[i] = (u8)(value < 0 ? fill[c] : value);
                    }
                }
                channels = out;
                u8 *before = planes;
                planes = others, others = before;
            } else if (code == COLOR) {
                for (int i = me; channels == 3 && i < pixels; i += threads) {
                    const int grey = luma(planes, pixels, i);
                    for (int c = 0; c < 3; c++)
                        planes[c * pixels + i] = blended(grey, planes[c * pixels + i], (float)o.value);
                }
            } else if (code != NONE) {
                for (int i = me; i < 768; i += threads)
                    counts[i / 256][i % 256] = 0;
                if (me == 0)
                    total = 0;
                __syncthreads();  // nothing is counted yet
                if (code == AUTOCONTRAST || code == EQUALIZE)
                    for (int i = me; i < channels * pixels; i += threads)
                        atomicAdd(&counts[i / pixels][planes[i]], 1u);
                u32 sum = 0;
                for (int i = me; code == CONTRAST && i < pixels; i += threads)
                    sum += channels == 1 ? planes[i] : luma(planes, pixels, i);
                atomicAdd(&total, sum);
                __syncthreads();  // all is counted
                for (int c = me; c < channels; c += threads) {
                    const int mean = (int)((double)total / (double)pixels + 0.5);
                    make_table(code, o.value, counts[c], mean, lookup[c]);
                }
                __syncthreads();  // the tables are there
                for (int i = me; i < channels * pixels; i += threads)
                    planes[i] = lookup[i / pixels][planes[i]];
            }
            __syncthreads();  // the operation is done
        }
        const i64 first = p * 3 * pixels;
        float *reals = (float *)images + first;
        for (int i = me; i < 3 * pixels; i += threads) {
            const int c = i / pixels, value = planes[channels == 3 ? i : i % pixels];
            if (s.floats)
                reals[i] = tables[256 * c + value];
            else
                images[first + i] = (u8)value;
        }
        for (int n = 0; n < view.erased; n++) {
            __syncthreads();  // what is erased now was written before
            const Rectangle &r = view.rectangle[n];
            const int area = (int)(r.height * r.width);
            for (int i = me; i < 3 * area; i += threads) {
                const int c = i / area, y = i % area / (int)r.width, x = i % (int)r.width;
                const float value = tables[r.filling + (s.noise ? i : c)];
                reals[c * pixels + (r.top + y) * size + r.left + x] = value;
            }
        }
        if (me == 0)
            drawn[p] = 1;
    }
}

#ifdef KERNEL
KERNEL(augment)
#endif
