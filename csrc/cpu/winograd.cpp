// 3x3 convolution, stride 1, padding 1, by Winograd's method F(2x2, 3x3), channels_last:
//   y = A^T [sum_c (G w G^T) * (B^T d B)] A + bias + residual
// for each 2x2 tile of y and the 4x4 patch d of x that it depends on. 16 multiplications replace 36. The maps
//   B^T = [1 0 -1 0; 0 1 1 0; 0 -1 1 0; 0 1 0 -1]    G = [1 0 0; 1/2 1/2 1/2; 1/2 -1/2 1/2; 0 0 1]    A^T = [1 1 1 0; 0 1 -1 -1]
// only add, so that errors are those of a direct sum. The arithmetic is float32. For bfloat16 the transformed patches and
// weights are rounded once, and vdpbf16ps sums their products in float32.
//
// After nearest upsampling, d has the rows (p, q, q, r), and B^T maps them to (p - q, 2 q, 0, q - r). So 9 multiplications
// replace 36, on the small image. The factor 2 is part of the weights.
//
// Work: a task is a block of tiles (lines of tiles or a part of a line) and, if there are fewer blocks than threads, a part of
// the outputs. The task copies the pixels of its patches as float32 into its own memory, with the zeros around them and after
// norm and SiLU if requested. It stores the transformed patches there, too (at most kBlockBytes, so that they stay in the L2
// cache). For every kColumns outputs it then computes the products [tiles, C] x [C, kColumns] and transforms their sums into y.
// So x is read once and y is written once. Each block reads the weights once, in memory order.
//
// Layouts: patches [spot][C / kChunk][tile][kChunk]; weights [K / kColumns][spot][C / kPair][kColumns][kPair].
#include <cstdint>
#include <cstdlib>

#include "../common/parallel.h"
#include "../common/vec.h"
#include "../kernels.h"

// Not every AVX-512 processor has vdpbf16ps. Only the functions that use it are compiled for it, and called if it is available.
#if defined(FASTDDPM_VEC_AVX512) && defined(__GNUC__)
#define FASTDDPM_DOT __attribute__((target("avx512bf16")))
#else
#define FASTDDPM_DOT
#endif

namespace fastddpm {
namespace FASTDDPM_VARIANT {
namespace {

constexpr int kTile = 2;
constexpr int kChunk = 32;            // adjacent channels of a patch
constexpr int kColumns = 2 * kLanes;  // outputs that are computed together
// The number of tiles that are computed together is a multiple of kTileStep, at most kMaxTiles. The sums of kMaxTiles tiles, two
// vectors of weights and one of a patch fill the 32 registers of AVX-512, or the 16 of AVX2.
constexpr int kTileStep = kLanes == 16 ? 4 : 2;
constexpr int kMaxTiles = 3 * kTileStep;
constexpr int64_t kBlockBytes = 384 << 10;
constexpr int kAhead = 16 << 10;  // distance of the prefetched weights from those in use, in bytes

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// kSide: the side of the patch, transformed or not. The transformed patch has kSide * kSide spots.
struct Plain3x3 {
    static constexpr bool kUpsampled = false;
    static constexpr int kSide = 4, kSpots = kSide * kSide;
};
struct Upsampled {
    static constexpr bool kUpsampled = true;
    static constexpr int kSide = 3, kSpots = kSide * kSide;
};

// Tiles [first, first + count), ordered by sample, line and column.
struct Block {
    int64_t first, count;
    int64_t rows;  // count, rounded up to kTileStep; the additional rows repeat the last tile
};

// ---- the two linear maps, on vectors of channels ----

template <class Image>
inline void patch_row(const vfloat* d, int stride, vfloat* out) {
    if constexpr (Image::kUpsampled) {
        out[0] = d[0] - d[stride];
        out[1] = d[stride];
        out[2] = d[stride] - d[2 * stride];
    } else {
        out[0] = d[0] - d[2 * stride];
        out[1] = d[stride] + d[2 * stride];
        out[2] = d[2 * stride] - d[stride];
        out[3] = d[stride] - d[3 * stride];
    }
}

// (y0, y1) of a tile's row, from the sums of a row of the patch.
template <class Image>
inline void tile_row(const vfloat* m, vfloat* y) {
    if constexpr (Image::kUpsampled) {
        y[0] = m[0] + m[1];
        y[1] = m[1] - m[2];
    } else {
        y[0] = m[0] + m[1] + m[2];
        y[1] = m[1] - m[2] - m[3];
    }
}

// B^T d B. stride: the distance from a pixel of d to the one below it.
template <class Image>
inline void transform_patch(const float* d, int64_t stride, int64_t channels, vfloat out[Image::kSpots]) {
    constexpr int kSide = Image::kSide;
    vfloat half[Image::kSpots], column[kSide];
    for (int j = 0; j < kSide; ++j) {
        for (int i = 0; i < kSide; ++i) column[i] = load(d + i * stride + j * channels);
        patch_row<Image>(column, 1, half + j * kSide);
    }
    for (int i = 0; i < kSide; ++i) patch_row<Image>(half + i, kSide, out + i * kSide);
}

// ---- rounding: vec.h's version takes six instructions ----

inline void store_rounded(float* p, vfloat v) { store(p, v); }
inline void store_chunk(float* p, const vfloat* v) {
    for (int i = 0; i < kChunk / kLanes; ++i) store(p + i * kLanes, v[i]);
}
#ifdef FASTDDPM_VEC_AVX512
FASTDDPM_DOT inline void store_rounded(bfloat16* p, vfloat v) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
    __builtin_memcpy(p, &rounded, sizeof rounded);
}
FASTDDPM_DOT inline void store_chunk(bfloat16* p, const vfloat* v) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]);
    __builtin_memcpy(p, &rounded, sizeof rounded);
}
#else
inline void store_rounded(bfloat16* p, vfloat v) { store(p, v); }  // never called, but must compile
#endif

// The offset of a tile's first pixel in y.
struct Corner {
    int64_t sample, top, left;
    Corner(const WinogradArgs& args, int64_t tile) {
        const int64_t across = args.width / kTile, tiles = args.height / kTile * across;
        sample = tile / tiles;
        top = tile % tiles / across * kTile;
        left = tile % across * kTile;
    }
};

// Computes y of a block's tiles and kColumns outputs from their sums [spot][rows][kColumns].
template <class Image, class Y>
FASTDDPM_DOT void transform_sums(const WinogradArgs& args, const Block& block, const float* sums, int64_t output) {
    constexpr int kSide = Image::kSide;
    for (int64_t r = 0; r < block.count; ++r) {
        const Corner corner(args, block.first + r);
        const int64_t base = ((corner.sample * args.height + corner.top) * args.width + corner.left) * args.outputs;
        for (int64_t k = 0; k < kColumns; k += kLanes) {
            const vfloat bias = args.bias ? load(args.bias + output + k) : vfloat{};
            vfloat half[kTile][kSide];
            for (int j = 0; j < kSide; ++j) {
                vfloat m[kSide], tile[kTile];
                for (int i = 0; i < kSide; ++i) m[i] = load(sums + ((i * kSide + j) * block.rows + r) * kColumns + k);
                tile_row<Image>(m, tile);
                for (int i = 0; i < kTile; ++i) half[i][j] = tile[i];
            }
            for (int i = 0; i < kTile; ++i) {
                vfloat tile[kTile];
                tile_row<Image>(half[i], tile);
                for (int j = 0; j < kTile; ++j) {
                    const int64_t at = base + (i * args.width + j) * args.outputs + output + k;
                    vfloat y = tile[j] + bias;
                    if (args.residual) y += load(static_cast<const Y*>(args.residual) + at);
                    store_rounded(static_cast<Y*>(args.y) + at, y);
                }
            }
        }
    }
}

// Prefetches weights from memory, because the processor's prefetching stops at the end of a page.
inline void prefetch_columns(const void* weights) {
    const uintptr_t ahead =
        reinterpret_cast<uintptr_t>(weights) + kAhead;  // not a pointer, as it may be past the weights' end
    __builtin_prefetch(reinterpret_cast<const void*>(ahead));
    if (kColumns * sizeof(float) > 64) __builtin_prefetch(reinterpret_cast<const void*>(ahead + 64));
}

// ---- float32 ----

// [R, channels] x [channels, kColumns]; chunk: distance from one chunk of the patches to the next.
template <int R>
inline void multiply(const float* patches, int64_t chunk, const float* weights, int64_t channels, float* sums) {
    vfloat acc[R][2] = {};
    for (int64_t c = 0; c < channels; c += kChunk, patches += chunk) {
        for (int i = 0; i < kChunk; ++i, weights += kColumns) {
            prefetch_columns(weights);
            const vfloat low = load(weights), high = load(weights + kLanes);
            for (int r = 0; r < R; ++r) {
                const vfloat d = splat(patches[r * kChunk + i]);
                acc[r][0] = fma(d, low, acc[r][0]);
                acc[r][1] = fma(d, high, acc[r][1]);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        store(sums + r * kColumns, acc[r][0]);
        store(sums + r * kColumns + kLanes, acc[r][1]);
    }
}

// ---- bfloat16 ----

#ifdef FASTDDPM_VEC_AVX512
template <int R>
FASTDDPM_DOT inline void multiply(const bfloat16* patches, int64_t chunk, const bfloat16* weights, int64_t channels,
                                  float* sums) {
    __m512 acc[R][2] = {};
    for (int64_t c = 0; c < channels; c += kChunk, patches += chunk) {
        // No prefetch here: with one, GCC 12 keeps acc in memory.
        for (int i = 0; i < kChunk; i += 2, weights += 2 * kColumns) {
            const __m512bh low = (__m512bh)_mm512_loadu_si512(weights);
            const __m512bh high = (__m512bh)_mm512_loadu_si512(weights + kColumns);
            for (int r = 0; r < R; ++r) {
                int pair;
                __builtin_memcpy(&pair, patches + r * kChunk + i, sizeof pair);
                const __m512bh d = (__m512bh)_mm512_set1_epi32(pair);
                acc[r][0] = _mm512_dpbf16_ps(acc[r][0], low, d);
                acc[r][1] = _mm512_dpbf16_ps(acc[r][1], high, d);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        _mm512_storeu_ps(sums + r * kColumns, acc[r][0]);
        _mm512_storeu_ps(sums + r * kColumns + kLanes, acc[r][1]);
    }
}
#endif

// The part of x that a block's patches cover. Lines are numbered through all samples, each with a line of zeros above and
// below. Column 0 is a column of zeros.
template <class Image>
struct Window {
    static constexpr int kShrink = Image::kUpsampled ? 2 : 1;
    int64_t height, width;                 // of x
    int64_t line, lines, column, columns;  // of the window
    int64_t channels;

    Window(const WinogradArgs& args, const Block& block)
        : height(args.height / kShrink), width(args.width / kShrink), channels(args.channels) {
        const Corner first(args, block.first), last(args, block.first + block.count - 1);
        const int64_t last_line = line_of(last);
        line = line_of(first);
        lines = last_line - line + Image::kSide;
        const bool one = line == last_line;
        column = one ? first.left / kShrink : 0;
        columns = one ? last.left / kShrink - column + Image::kSide : width + 2;
    }

    int64_t line_of(const Corner& corner) const { return corner.sample * (height + 2) + corner.top / kShrink; }
    int64_t stride() const { return columns * channels; }
    int64_t size() const { return lines * stride(); }
    // The position of a tile's patch.
    int64_t offset(const Corner& corner) const {
        return (line_of(corner) - line) * stride() + (corner.left / kShrink - column) * channels;
    }
};

template <class Image, class X>
void fill(const WinogradArgs& args, const Window<Image>& window, float* out) {
    const int64_t channels = args.channels, vectors = args.samples * channels;
    for (int64_t i = 0; i < window.lines; ++i) {
        const int64_t line = window.line + i, sample = line / (window.height + 2);
        const int64_t row = line % (window.height + 2) - 1;
        const float* h = args.coefficients + sample * channels;
        const X* x = static_cast<const X*>(args.x) + (sample * window.height + row) * window.width * channels;
        for (int64_t j = 0; j < window.columns; ++j, out += channels) {
            const int64_t column = window.column + j - 1;
            if (row < 0 || row >= window.height || column < 0 || column >= window.width) {
                for (int64_t c = 0; c < channels; ++c) out[c] = 0;
                continue;
            }
            const X* pixel = x + column * channels;
            if (!args.coefficients) {
                for (int64_t c = 0; c < channels; c += kLanes) store(out + c, load(pixel + c));
                continue;
            }
            for (int64_t c = 0; c < channels; c += kLanes) {
                const vfloat t = load(pixel + c) + load(h + c);
                store(out + c, silu(fma(t, load(h + vectors + c), load(h + 2 * vectors + c))));
            }
        }
    }
}

template <class Image, class T>
FASTDDPM_DOT void transform_patches(const WinogradArgs& args, const Block& block, const Window<Image>& window,
                                    const float* x, T* patches) {
    constexpr int kVectors = kChunk / kLanes;
    const int64_t spot = args.channels * block.rows;
    for (int64_t r = 0; r < block.rows; ++r) {
        const float* d = x + window.offset(Corner(args, block.first + smaller(r, block.count - 1)));
        for (int64_t c = 0; c < args.channels; c += kChunk) {
            vfloat done[kVectors][Image::kSpots];
            for (int v = 0; v < kVectors; ++v)
                transform_patch<Image>(d + c + v * kLanes, window.stride(), args.channels, done[v]);
            T* out = patches + (c * block.rows + r * kChunk);
            for (int s = 0; s < Image::kSpots; ++s) {
                vfloat chunk[kVectors];
                for (int v = 0; v < kVectors; ++v) chunk[v] = done[v][s];
                store_chunk(out + s * spot, chunk);
            }
        }
    }
}

template <class Image, class T>
FASTDDPM_DOT void multiply_block(const Block& block, const T* patches, const T* weights, int64_t channels,
                                 float* sums) {
    const int64_t chunk = block.rows * kChunk;
    for (int s = 0; s < Image::kSpots; ++s) {
        for (int64_t r = 0; r < block.rows;) {
            const T* first = patches + r * kChunk;
            float* out = sums + r * kColumns;
            const int64_t left = block.rows - r;
            if (left >= kMaxTiles && left != kMaxTiles + kTileStep) {  // these are better split evenly
                multiply<kMaxTiles>(first, chunk, weights, channels, out);
                r += kMaxTiles;
            } else if (left >= 2 * kTileStep) {
                multiply<2 * kTileStep>(first, chunk, weights, channels, out);
                r += 2 * kTileStep;
            } else {
                multiply<kTileStep>(first, chunk, weights, channels, out);
                r += kTileStep;
            }
        }
        patches += channels * block.rows;
        weights += channels * kColumns;
        sums += block.rows * kColumns;
    }
}

// The memory of one thread, reused by its next task. (Not a std::vector, because the variants would share its weak symbols.)
struct Scratch {
    char* memory = nullptr;
    size_t size = 0;

    char* get(size_t bytes) {
        if (bytes > size) {
            std::free(memory);
            size = (bytes + 63) / 64 * 64;
            memory = static_cast<char*>(std::aligned_alloc(64, size));
            if (!memory) std::abort();
        }
        return memory;
    }
    ~Scratch() { std::free(memory); }
};

template <class Image, class T>
void convolve(const WinogradArgs& args) {
    constexpr int kSpots = Image::kSpots;
    const int64_t across = args.width / kTile, lines = args.samples * (args.height / kTile);
    const int64_t most = larger(kMaxTiles, kBlockBytes / (kSpots * args.channels * sizeof(T)) / kMaxTiles * kMaxTiles);
    // Blocks are lines, in a number that splits evenly among the threads, or equal parts of a line.
    const int64_t pieces = (across + most - 1) / most, piece = (across + pieces - 1) / pieces;
    const int64_t at_once = larger(1, most / across) * args.threads;
    const int64_t rounds = (lines + at_once - 1) / at_once;
    const int64_t height = pieces > 1 ? 1 : (lines + rounds * args.threads - 1) / (rounds * args.threads);
    const int64_t blocks = (lines + height - 1) / height * pieces;
    const int64_t strips = args.outputs / kColumns;
    const int64_t parts = blocks >= args.threads ? 1 : smaller(strips, (args.threads + blocks - 1) / blocks);
    parallel_for(blocks * parts, 1, args.threads, [&](int64_t task) {
        static thread_local Scratch scratch;
        const int64_t line = task / parts / pieces * height, column = task / parts % pieces * piece;
        Block block;
        block.first = line * across + column;
        block.count = pieces > 1 ? smaller(piece, across - column) : smaller(height, lines - line) * across;
        block.rows = (block.count + kTileStep - 1) / kTileStep * kTileStep;
        const Window<Image> window(args, block);
        const int64_t patch_size = kSpots * block.rows * args.channels, sum_size = kSpots * block.rows * kColumns;
        float* sums =
            reinterpret_cast<float*>(scratch.get((sum_size + window.size()) * sizeof(float) + patch_size * sizeof(T)));
        float* x = sums + sum_size;
        T* patches = reinterpret_cast<T*>(x + window.size());
        args.x_dtype == Dtype::float32 ? fill<Image, float>(args, window, x) : fill<Image, bfloat16>(args, window, x);
        transform_patches<Image, T>(args, block, window, x, patches);
        const int64_t part = task % parts;
        for (int64_t strip = part * strips / parts; strip < (part + 1) * strips / parts; ++strip) {
            const T* weights = static_cast<const T*>(args.weights) + strip * kSpots * args.channels * kColumns;
            multiply_block<Image>(block, patches, weights, args.channels, sums);
            args.y_dtype == Dtype::float32 ? transform_sums<Image, float>(args, block, sums, strip * kColumns)
                                           : transform_sums<Image, bfloat16>(args, block, sums, strip * kColumns);
        }
    });
}

template <class Image>
void convolve(const WinogradArgs& args) {
    if (args.dtype == Dtype::float32) convolve<Image, float>(args);
#ifdef FASTDDPM_VEC_AVX512
    if (args.dtype == Dtype::bfloat16) convolve<Image, bfloat16>(args);
#endif
}

// A line of the product of G and w's taps. After upsampling the third entry is absent and the second is doubled.
inline void weight_row(const vfloat* w, int stride, bool upsampled, vfloat* out) {
    const vfloat half = splat(0.5f), ends = w[0] + w[2 * stride], middle = w[stride];
    *out++ = w[0];
    *out++ = upsampled ? ends + middle : half * (ends + middle);
    if (!upsampled) *out++ = half * (ends - middle);
    *out = w[2 * stride];
}

}  // namespace

void winograd(const WinogradArgs& args) {
    if (args.samples == 0) return;
    args.upsample ? convolve<Upsampled>(args) : convolve<Plain3x3>(args);
}

// G w G^T in the layout above.
void winograd_weights(const WinogradWeightsArgs& args) {
    const int pair = args.dtype == Dtype::bfloat16 ? 2 : 1, side = args.upsample ? Upsampled::kSide : Plain3x3::kSide;
    parallel_for(args.outputs / kColumns, 1, args.threads, [&](int64_t strip) {
        for (int64_t c = 0; c < args.channels; c += pair)
            for (int64_t k = 0; k < kColumns; k += kLanes) {
                vfloat spots[2][Plain3x3::kSpots];
                for (int p = 0; p < pair; ++p) {
                    vfloat w[9], lines[3][Plain3x3::kSide], column[3];
                    for (int lane = 0; lane < kLanes; ++lane) {
                        const int64_t output = strip * kColumns + k + lane;
                        for (int tap = 0; tap < 9; ++tap)
                            w[tap][lane] = args.weight[(output * args.channels + c + p) * 9 + tap];
                    }
                    for (int j = 0; j < 3; ++j) weight_row(w + j, 3, args.upsample, lines[j]);
                    for (int i = 0; i < side; ++i) {
                        for (int j = 0; j < 3; ++j) column[j] = lines[j][i];
                        weight_row(column, 1, args.upsample, spots[p] + i * side);
                    }
                }
                for (int s = 0; s < side * side; ++s) {
                    const int64_t at = ((strip * side * side + s) * args.channels + c) * kColumns + k * pair;
                    if (pair == 1) {
                        store(static_cast<float*>(args.packed) + at, spots[0][s]);
                        continue;
                    }
                    const vhalf even = narrow(spots[0][s], bfloat16{}), odd = narrow(spots[1][s], bfloat16{});
                    uint16_t* out = static_cast<uint16_t*>(args.packed) + at;
                    for (int lane = 0; lane < kLanes; ++lane) {
                        out[2 * lane] = even[lane];
                        out[2 * lane + 1] = odd[lane];
                    }
                }
            }
    });
}

}  // namespace FASTDDPM_VARIANT
}  // namespace fastddpm
