// The two linear maps around the products of a 3x3 convolution by Winograd's method, F(4x4, 3x3), channels inner:
//   y = A^T [sum_c (G w G^T) * (B^T d B)] A     for each 4x4 tile of y and the 6x6 patch d of x that it depends on
// The products in the middle, 36 of [tiles, C] x [C, K], are the caller's; 36 multiplications stand for 144.
//
// Interpolation at 0, +-a, +-b and infinity with a = 1/sqrt(2), b = sqrt(2), whose rounding errors are at most half of
// those at the usual 0, +-1, +-2. Then B^T has the rows
//   d0 - 5/2 d2 + d4,  (d4 - 2 d2) +- a (d3 - 2 d1),  (d4 - d2 / 2) +- b (d3 - d1 / 2),  d1 - 5/2 d3 + d5
// and A^T the powers 0 to 3 of the points.
//
// Work: a task is one tile; vectors run over channels. Bytes: input reads x 2.25 times (from the cache but for once) and
// writes 2.25 times its size, output reads 2.25 times the size of y.
#include "../common/parallel.h"
#include "../common/vec.h"
#include "../kernels.h"

namespace fastddpm {
namespace FASTDDPM_VARIANT {
namespace {

constexpr int kTile = 4, kPatch = 6;
constexpr float kA = 0.70710678f, kB = 1.41421356f;

// out = B^T d
inline void input_row(const vfloat d[kPatch], vfloat* out, int stride) {
    const vfloat half = splat(0.5f), two = splat(2.0f), most = splat(2.5f);
    vfloat even = fma(-two, d[2], d[4]), odd = splat(kA) * fma(-two, d[1], d[3]);
    vfloat even_b = fma(-half, d[2], d[4]), odd_b = splat(kB) * fma(-half, d[1], d[3]);
    out[0] = fma(-most, d[2], d[0] + d[4]);
    out[stride] = even + odd;
    out[2 * stride] = even - odd;
    out[3 * stride] = even_b + odd_b;
    out[4 * stride] = even_b - odd_b;
    out[5 * stride] = fma(-most, d[3], d[1] + d[5]);
}

// out = A^T m
inline void output_row(const vfloat m[kPatch], vfloat* out, int stride) {
    vfloat sum_a = m[1] + m[2], sum_b = m[3] + m[4];
    vfloat dif_a = splat(kA) * (m[1] - m[2]), dif_b = splat(kB) * (m[3] - m[4]);
    out[0] = m[0] + (sum_a + sum_b);
    out[stride] = dif_a + dif_b;
    out[2 * stride] = fma(splat(0.5f), sum_a, splat(2.0f) * sum_b);
    out[3 * stride] = fma(splat(0.5f), dif_a, fma(splat(2.0f), dif_b, m[5]));
}

template <class Body>
void for_tiles(const WinogradArgs& args, const Body& body) {
    const int64_t across = args.width / kTile, down = args.height / kTile;
    parallel_for(args.samples * down * across, 8, args.threads, [&](int64_t tile) {
        body(tile, tile / (down * across), tile / across % down * kTile, tile % across * kTile);
    });
}

}  // namespace

void winograd_input(const WinogradArgs& args) {
    for_tiles(args, [&](int64_t tile, int64_t sample, int64_t top, int64_t left) {
        const float* x = args.image + sample * args.height * args.width * args.channels;
        float* out = args.transformed + tile * kPatch * kPatch * args.channels;
        for (int64_t c = 0; c < args.channels; c += kLanes) {
            vfloat half[kPatch * kPatch], patch[kPatch], done[kPatch];
            for (int j = 0; j < kPatch; ++j) {
                const int64_t column = left + j - 1;
                for (int i = 0; i < kPatch; ++i) {
                    const int64_t row = top + i - 1;
                    const bool inside = row >= 0 && row < args.height && column >= 0 && column < args.width;
                    patch[i] = inside ? load(x + (row * args.width + column) * args.channels + c) : vfloat{};
                }
                input_row(patch, half + j, kPatch);
            }
            for (int i = 0; i < kPatch; ++i) {
                input_row(half + i * kPatch, done, 1);
                for (int j = 0; j < kPatch; ++j) store(out + (i * kPatch + j) * args.channels + c, done[j]);
            }
        }
    });
}

void winograd_output(const WinogradArgs& args) {
    for_tiles(args, [&](int64_t tile, int64_t sample, int64_t top, int64_t left) {
        const float* sums = args.transformed + tile * kPatch * kPatch * args.channels;
        const int64_t corner = ((sample * args.height + top) * args.width + left) * args.channels;
        for (int64_t c = 0; c < args.channels; c += kLanes) {
            vfloat half[kTile * kPatch], column[kPatch], done[kTile];
            const vfloat bias = load(args.bias + c);
            for (int j = 0; j < kPatch; ++j) {
                for (int i = 0; i < kPatch; ++i) column[i] = load(sums + (i * kPatch + j) * args.channels + c);
                output_row(column, half + j, kPatch);
            }
            for (int i = 0; i < kTile; ++i) {
                output_row(half + i * kPatch, done, 1);
                for (int j = 0; j < kTile; ++j) {
                    const int64_t at = corner + (i * args.width + j) * args.channels + c;
                    vfloat y = done[j] + bias;
                    if (args.residual) y += load(args.residual + at);
                    store(args.image + at, y);
                }
            }
        }
    });
}

}  // namespace FASTDDPM_VARIANT
}  // namespace fastddpm
