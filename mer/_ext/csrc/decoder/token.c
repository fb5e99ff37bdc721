/* Norms, rotary embedding, and the small sums between the matrix products. */
#include <math.h>

#include "../mer_decoder.h"
#include "gates.h"

MER_CLONES
void mer_rms_norm(const float *x, const float *w, float *y, long n, float eps) {
    const float factor = 1.0f / sqrtf(dot(x, x, n) / (float)n + eps);
    if (w)
        for (long i = 0; i < n; i++) y[i] = w[i] * (x[i] * factor);
    else
        for (long i = 0; i < n; i++) y[i] = x[i] * factor;
}

MER_CLONES
float mer_square_sum(const float *x, long n) { return dot(x, x, n); }

MER_CLONES
void mer_scale(float *x, float factor, long n) {
    for (long i = 0; i < n; i++) x[i] *= factor;
}

void mer_soft_cap(float *x, float cap, long n) {
    for (long i = 0; i < n; i++) x[i] = cap * tanhf(x[i] / cap);
}

MER_CLONES
void mer_layer_norm(const float *x, const float *w, const float *bias, float *y, long n, float eps) {
    const float mean = total(x, n) / (float)n;
    for (long i = 0; i < n; i++) y[i] = x[i] - mean;
    const float factor = 1.0f / sqrtf(dot(y, y, n) / (float)n + eps);
    for (long i = 0; i < n; i++) y[i] = y[i] * factor * w[i] + bias[i];
}

MER_CLONES
void mer_add(float *x, const float *y, long n) {
    for (long i = 0; i < n; i++) x[i] += y[i];
}

MER_CLONES
void mer_add_scaled(float *x, const float *y, float factor, long n) {
    for (long i = 0; i < n; i++) x[i] += factor * y[i];
}

MER_CLONES
void mer_gate(float *x, const float *gate, long n) {
    for (long i = 0; i < n; i += LANES) {
        vf g, v;
        vf_load_some(&g, gate + i, n - i);
        vf_load_some(&v, x + i, n - i);
        vf_sigmoid(&g);
        v *= g;
        vf_store_some(x + i, &v, n - i);
    }
}

void mer_clip(float *x, float limit, long n) {
    for (long i = 0; i < n; i++) {
        if (x[i] > limit) x[i] = limit;
        if (x[i] < -limit) x[i] = -limit;
    }
}

void mer_rope_angles(int32_t position, const float *inv_freq, long pairs, float scale, float *cosine,
                     float *sine) {
    for (long i = 0; i < pairs; i++) {
        const float angle = (float)position * inv_freq[i];
        cosine[i] = cosf(angle) * scale;
        sine[i] = sinf(angle) * scale;
    }
}

MER_CLONES
void mer_rope(float *x, const float *cosine, const float *sine, long pairs, int interleaved) {
    if (interleaved) {
        for (long i = 0; i < pairs; i++) {
            const float a = x[2 * i], b = x[2 * i + 1];
            x[2 * i] = a * cosine[i] - b * sine[i];
            x[2 * i + 1] = b * cosine[i] + a * sine[i];
        }
    } else {
        float *second = x + pairs;
        for (long i = 0; i < pairs; i++) {
            const float a = x[i], b = second[i];
            x[i] = a * cosine[i] - b * sine[i];
            second[i] = b * cosine[i] + a * sine[i];
        }
    }
}

float mer_sigmoid(float x) {
    vf lanes = VF_ALL(x);
    vf_sigmoid(&lanes);
    return lanes[0];
}
