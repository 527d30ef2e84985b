// How the coefficients of one query are made from its per-order sums D_p = sum of w_s x_s^p over its far logits:
// the rules of the CPU engine's `series`, in f64, one thread a query.
//
// D_p / D_0 are the exact moments of the far logits. All arrays are of MOST elements, at least the number of terms
// and 3, and live in the thread's own memory.
//
// FLOPs: about 100 (Gauss P = 2, Hermite P = 3) to some thousands (Gauss P >= 6, an eigenvalue problem).
#pragma once
#include "prelude.cuh"

constexpr int RULE_FIXED = 0;    // a_p about the true logit, the same for every query
constexpr int RULE_GAUSS = 1;    // e^x in value and slope at the Gauss nodes of the far logits
constexpr int RULE_HERMITE = 2;  // the least-squares fit of e^x under N(mean, (tau * deviation)^2)

// What rounding may have changed in the D_p.
struct Noise {
    f64 relative;  // relative to the sum of w_s |x_s|^p
    f64 absolute;  // relative to D_0 reach^p
    f64 reach;     // at least the largest |x|; 0 where no sums of features are among the D_p
};

// The kernel is e^log_scale * sum of c_p x^p.
struct Fit {
    f64 log_scale;    // minus infinity where there is no far past
    f64 denominator;  // sum of c_p D_p
    f64 mean, variance;
};

namespace series {

constexpr f64 EPSILON = 2.220446049250313e-16;
constexpr int MOST_NODES = 16;
constexpr f64 CLEARLY = 4.0;      // how far above its rounding error a pivot must stand
constexpr f64 STRAIGHT = 1e-30;   // below this variance e^x is a line through the mean
constexpr f64 STRIDE = 16.0;      // the largest span over which one power series is summed

DEVICE bool finite(f64 x) { return x * 0.0 == 0.0; }
DEVICE f64 nan() { return f64(NAN); }
DEVICE f64 infinity() { return f64(INFINITY); }

// Rewrites sum of c_p (x + b)^p as sum of c_p x^p (Horner's scheme, repeated).
DEVICE void move_polynomial(f64* c, int n, f64 b) {
    for (int start = 1; start < n; start++)
        for (int p = n - 1; p >= start; p--) c[p - 1] += b * c[p];
}
// Rewrites E[x^p] as E[(x + b)^p]: the transpose.
DEVICE void move_moments(f64* m, int n, f64 b) {
    for (int start = n - 1; start >= 1; start--)
        for (int p = start; p < n; p++) m[p] += b * m[p - 1];
}
// Rewrites Newton's form c_0 + (y - z_0)(c_1 + (y - z_1)(c_2 + ...)) as sum of c_p y^p.
DEVICE void expand_newton(f64* c, const f64* z, int n) {
    for (int start = n - 1; start >= 1; start--)
        for (int p = start; p < n; p++) c[p - 1] -= z[start - 1] * c[p];
}

// A number drawn towards 0 where its error could have made it.
DEVICE f64 subdued(f64 number, f64 error) {
    f64 sure = number * number, unsure = 4.0 * error * error;
    return unsure > 0.0 ? number * (sure / (sure + unsure)) : number;
}

// The variance from the first two moments, or 0 where it is no more than their rounding error.
DEVICE f64 spread(f64 mean, f64 second, const Noise& noise) {
    f64 variance = second - mean * mean;
    f64 error = noise.relative * second + noise.absolute * noise.reach * (noise.reach + 2.0 * fabs(mean));
    return variance < 0.0 || variance <= error ? 0.0 : variance;
}

// E[(x - mean)^3] / deviation^3 of four moments.
DEVICE f64 skewness(const f64* m, f64 variance, const Noise& noise) {
    f64 mean = m[1], second = m[2], third = m[3];
    f64 scale = 1.0 / (variance * sqrt(variance)), square = mean * mean;
    f64 skew = (third - mean * (3.0 * variance + square)) * scale;
    // What the rounding of the moments may have made of it, E|x|^3 being at least E[x^2]^(3/2).
    f64 root = sqrt(second), size = fabs(mean), reach = noise.reach;
    f64 magnitude = fmax(fabs(third), second * root) + size * (3.0 * second + size * (3.0 * root + size));
    f64 unsure = noise.relative * magnitude + noise.absolute * reach * (reach * reach + 3.0 * size * (reach + size));
    return subdued(skew, unsure * scale);
}

// The cubic through two nodes deviation * (skew -+ sqrt(skew^2 + 4)) / 2 from the mean: about their midpoint, with r
// half their distance,
//     (C - r^2 S/2) + (3S - C)/2 y + S/2 y^2 + K/2 y^3,   C = cosh r, S = sinh r / r, K = (C - S) / r^2,
// all of it times e^-r. Gives the largest node, and in `mass` the sum of the nodes' weights times e^(node - largest).
DEVICE f64 two_nodes(f64 mean, f64 deviation, f64 skew, f64* c, f64* mass) {
    f64 root = sqrt(skew * skew + 4.0);
    f64 half = 0.5 * deviation * root, middle = mean + 0.5 * deviation * skew;
    f64 light = 2.0 / (root * (root + fabs(skew)));
    f64 upper = skew > 0.0 ? light : 1.0 - light;
    f64 square = half * half, across = exp(-2.0 * half);
    f64 cosine = 0.5 + 0.5 * across, sine, bend;
    if (half < 1.0) {
        // Series, for here the closed forms cancel: S = sum of r^2k / (2k+1)!, K = sum of (2k+2) r^2k / (2k+3)!.
        f64 s = 0.0, k = 0.0;
        // Unrolled, so that all divisions are the compiler's.
#pragma unroll
        for (int i = 8; i >= 0; i--) {
            f64 factorial = 1.0;
#pragma unroll
            for (int j = 2; j <= 2 * i + 1; j++) factorial *= f64(j);
            s = s * square + 1.0 / factorial;
            k = k * square + f64(2 * i + 2) / (factorial * f64((2 * i + 2) * (2 * i + 3)));
        }
        f64 scale = exp(-half);
        sine = s * scale;
        bend = k * scale;
    } else {
        sine = (0.5 - 0.5 * across) / half;
        bend = (cosine - sine) / square;
    }
    c[0] = cosine - 0.5 * square * sine;
    c[1] = 0.5 * (3.0 * sine - cosine);
    c[2] = 0.5 * sine;
    c[3] = 0.5 * bend;
    move_polynomial(c, 4, -middle);
    *mass = (1.0 - upper) * across + upper;
    return middle + half;
}

// The eigenvalues of a symmetric tridiagonal matrix in place of its diagonal d: implicit QL with Wilkinson's shift.
// e[i] lies between d[i] and d[i + 1]; it is used up.
DEVICE void eigenvalues(f64* d, f64* e, int n) {
    for (int low = 0; low < n; low++) {
        for (int round = 0; round < 60; round++) {
            int high = low;
            while (high + 1 < n && fabs(e[high]) > EPSILON * (fabs(d[high]) + fabs(d[high + 1]))) high++;
            if (high == low) break;
            f64 half = (d[low + 1] - d[low]) / (2.0 * e[low]);
            f64 root = sqrt(half * half + 1.0);
            f64 g = d[high] - d[low] + e[low] / (half + (half < 0.0 ? -root : root));
            f64 sine = 1.0, cosine = 1.0, p = 0.0;
            bool split = false;
            for (int i = high - 1; i >= low; i--) {
                f64 f = sine * e[i], b = cosine * e[i];
                f64 r = sqrt(f * f + g * g);
                e[i + 1] = r;
                if (r == 0.0) {
                    d[i + 1] -= p;
                    e[high] = 0.0;
                    split = true;
                    break;
                }
                sine = f / r;
                cosine = g / r;
                g = d[i + 1] - p;
                r = (d[i] - g) * sine + 2.0 * cosine * b;
                p = sine * r;
                d[i + 1] = g + p;
                g = cosine * r - b;
            }
            if (!split) {
                d[low] -= p;
                e[low] = g;
                e[high] = 0.0;
            }
        }
    }
}

// f[z_0], f[z_0, z_1], ... of f(z) = e^(z - z_last), for ascending points, equal ones included: the first row of e^A
// (Opitz), whose power series only ever adds. A long span is walked in strides.
DEVICE void divided_differences(const f64* z, f64* row, int n) {
    int last = n - 1;
    f64 least = z[0], span = z[last] - least;
    f64 strides = fmax(ceil(span / STRIDE), 1.0), stride = 1.0 / strides;
    f64 shrink = exp(-span * stride), enough = f64(last) + span * stride;
    f64 term[2 * MOST_NODES];
    for (int i = 0; i < n; i++) row[i] = 0.0;
    row[0] = 1.0;
    for (f64 walked = 0.0; walked < strides; walked += 1.0) {
        for (int i = 0; i < n; i++) term[i] = row[i];
        for (f64 j = 1.0;; j += 1.0) {
            f64 factor = stride / j;
            bool settled = true;
            for (int i = last; i >= 1; i--) {
                term[i] = (term[i] * (z[i] - least) + term[i - 1]) * factor;
                row[i] += term[i];
                settled = settled && term[i] <= 0.25 * EPSILON * row[i];
            }
            term[0] = 0.0;
            // A number that is not finite never settles.
            if ((settled && j > enough) || j > enough + 200.0) break;
        }
        for (int i = 0; i < n; i++) row[i] *= shrink;
    }
}

// The Jacobi matrix of standardised logits from their moments (an even number of them, at least 4), no larger than
// their distinct values or the moments' digits allow: alpha on the diagonal, beta beside it at its own index.
// Gives its size.
DEVICE int jacobi(const f64* m, int count, f64 deviation, const Noise& noise, f64* alpha, f64* beta) {
    f64 z[2 * MOST_NODES], error[2 * MOST_NODES];
    f64 inverse = 1.0 / deviation, width = sqrt(m[2]) * inverse, power = 1.0;
    for (int p = 0; p < count; p++) {
        z[p] = m[p] * power;
        power *= inverse;
    }
    f64 reach = noise.absolute;
    for (int p = 0; p < count; p++) {
        // E|x|^p of an odd p lies between what its neighbours say.
        f64 size = fabs(z[p]);
        if (p % 2 == 1) size = p + 1 < count ? sqrt(fabs(z[p - 1] * z[p + 1])) : fmax(size, fabs(z[p - 1]) * width);
        error[p] = noise.relative * size + reach;
        reach *= noise.reach * inverse;
    }
    f64 offset = m[1] * inverse;
    move_moments(z, count, -offset);
    move_moments(error, count, fabs(offset));
    z[1] = 0.0;
    z[2] = 1.0;

    int size = 1;
    f64 last_error = 0.0;
    f64 before[MOST_NODES + 1], current[MOST_NODES + 1];
    for (int i = 0; i <= MOST_NODES; i++) before[i] = current[i] = 0.0;
    for (int i = 0; i < MOST_NODES; i++) alpha[i] = beta[i] = 0.0;
    before[0] = 1.0;
    current[1] = 1.0;
    f64 norm_before = 1.0, ratio_before = 0.0;
    for (int k = 1; k < count / 2; k++) {
        f64 norm = 0.0, next = 0.0;
        for (int i = 0; i <= k; i++) {
            norm += current[i] * z[i + k];
            next += current[i] * z[i + k + 1];
        }
        // To first order only the errors of the moments themselves reach E[pi_k^2], not those of pi_k.
        f64 norm_error = 0.0, next_error = 0.0, cross_error = 0.0;
        for (int i = 0; i <= k; i++) {
            for (int j = 0; j <= k; j++) {
                f64 product = fabs(current[i] * current[j]);
                norm_error += product * error[i + j];
                next_error += product * error[i + j + 1];
                cross_error += fabs(current[i] * before[j]) * error[i + j];
            }
        }
        if (!(norm > CLEARLY * norm_error && finite(next))) break;
        f64 ratio = next / norm, a = ratio - ratio_before, b = norm / norm_before;
        last_error = (next_error + fabs(a) * norm_error) / norm + 2.0 * cross_error / norm_before;
        alpha[k] = a;
        beta[k] = b;
        size = k + 1;
        // The next polynomial takes the place of the one before.
        for (int i = k + 1; i >= 0; i--) {
            f64 after = (i > 0 ? current[i - 1] : 0.0) - a * current[i] - b * before[i];
            before[i] = after;
        }
        for (int i = 0; i <= k + 1; i++) {
            f64 swap = before[i];
            before[i] = current[i];
            current[i] = swap;
        }
        norm_before = norm;
        ratio_before = ratio;
    }
    // The last alpha rests on the highest moment. Left to rounding errors it could put a node anywhere.
    alpha[size - 1] = subdued(alpha[size - 1], last_error);
    return size;
}

// pi_n(z), pi_n'(z) and the sum over k < n of pi_k(z)^2 / E[pi_k^2].
DEVICE void last_polynomial(const f64* alpha, const f64* beta, int n, f64 z, f64* value, f64* slope, f64* sum) {
    f64 before = 0.0, v = 1.0, slope_before = 0.0, s = 0.0, norm = 1.0, total = 0.0;
    for (int k = 0; k < n; k++) {
        if (k > 0) norm *= beta[k];
        total += v * v / norm;
        f64 next = (z - alpha[k]) * v - beta[k] * before;
        f64 next_slope = v + (z - alpha[k]) * s - beta[k] * slope_before;
        before = v;
        v = next;
        slope_before = s;
        s = next_slope;
    }
    *value = v;
    *slope = s;
    *sum = total;
}

// Newton's divided differences, every node twice: Golub and Welsch's nodes, Christoffel's weights.
DEVICE f64 many_nodes(f64 mean, f64 deviation, const f64* alpha, const f64* beta, int n, f64* c, f64* mass) {
    f64 nodes[MOST_NODES], beside[MOST_NODES], points[2 * MOST_NODES];
    for (int k = 0; k < n; k++) {
        nodes[k] = alpha[k];
        beside[k] = k + 1 < n ? sqrt(beta[k + 1]) : 0.0;
    }
    eigenvalues(nodes, beside, n);
    for (int i = 1; i < n; i++) {
        f64 node = nodes[i];
        int at = i;
        for (; at > 0 && nodes[at - 1] > node; at--) nodes[at] = nodes[at - 1];
        nodes[at] = node;
    }
    f64 total = 0.0;
    for (int i = 0; i < n; i++) {
        f64 value, slope, sum;
        last_polynomial(alpha, beta, n, nodes[i], &value, &slope, &sum);
        f64 step = value / slope;
        if (fabs(step) < 1e-6) nodes[i] -= step;
        last_polynomial(alpha, beta, n, nodes[i], &value, &slope, &sum);
        beside[i] = 1.0 / sum;
        total += beside[i];
    }
    for (int i = 0; i < n; i++) points[2 * i] = points[2 * i + 1] = deviation * nodes[i];
    f64 largest = points[2 * n - 1], sum = 0.0;
    for (int i = 0; i < n; i++) sum += beside[i] / total * exp(points[2 * i] - largest);
    divided_differences(points, c, 2 * n);
    expand_newton(c, points, 2 * n);
    move_polynomial(c, 2 * n, -mean);
    *mass = sum;
    return mean + largest;
}

// Writes D_p / D_0; false where there is no far past, or no answer, and `fit` says so.
DEVICE bool normalise(const f64* sums, f64* m, int count, f64* c, int terms, Fit* fit) {
    f64 total = sums[0], trouble = 0.0;
    if (total == 0.0) {
        for (int p = 0; p < terms; p++) c[p] = 0.0;
        *fit = Fit{-infinity(), 0.0, 0.0, 0.0};
        return false;
    }
    // Times 0, every number that is finite is 0, and any other NaN.
    for (int p = 0; p < count; p++) {
        m[p] = sums[p] / total;
        trouble += m[p] * 0.0;
    }
    if (trouble == 0.0 && total > 0.0 && total < infinity()) return true;
    for (int p = 0; p < terms; p++) c[p] = nan();
    *fit = Fit{nan(), nan(), nan(), nan()};
    return false;
}

template <int MOST>
DEVICE Fit gauss(const f64* sums, int count, const Noise& noise, f64 shift, f64* c, int terms) {
    constexpr int ROOM = MOST < 2 * MOST_NODES ? (MOST < 4 ? 4 : MOST) : 2 * MOST_NODES;
    f64 m[ROOM];
    int needed = terms < 2 * MOST_NODES ? terms : 2 * MOST_NODES;
    Fit fit;
    if (!normalise(sums, m, needed, c, terms, &fit)) return fit;
    f64 mean = m[1], variance = count > 2 ? spread(mean, sums[2] / sums[0], noise) : nan();
    f64 log_scale, mass;
    int used;
    if (needed == 2 || variance <= STRAIGHT) {
        c[0] = 1.0 - mean;
        c[1] = 1.0;
        used = 2;
        log_scale = mean;
        mass = 1.0;
    } else if (needed == 4) {
        log_scale = two_nodes(mean, sqrt(variance), skewness(m, variance, noise), c, &mass);
        used = 4;
    } else {
        used = 2;
        log_scale = mass = nan();
        if constexpr (MOST > 4) {
            f64 alpha[MOST_NODES], beta[MOST_NODES], deviation = sqrt(variance);
            int size = jacobi(m, needed, deviation, noise, alpha, beta);
            if (size == 2) {
                log_scale = two_nodes(mean, deviation, alpha[1], c, &mass);
            } else {
                log_scale = many_nodes(mean, deviation, alpha, beta, size, c, &mass);
            }
            used = 2 * size;
        }
    }
    for (int p = used; p < terms; p++) c[p] = 0.0;
    // The sum of c_p D_p, if it is near the same number by quadrature, which is positive: the numerators carry about
    // the same rounding errors, so that an average of equal values is that value.
    f64 quadrature = sums[0] * mass, denominator = nan();
    if (quadrature > 0.0 && quadrature < infinity()) {
        f64 sum = 0.0;
        for (int p = 0; p < terms; p++) sum += c[p] * sums[p];
        denominator = sum < 0.5 * quadrature ? 0.5 * quadrature : sum > 2.0 * quadrature ? 2.0 * quadrature : sum;
    }
    return Fit{log_scale, denominator, mean + shift, variance};
}

// With v = (tau * deviation)^2 and y = x - mean: e^(mean + v/2) * sum of b_j y^j, where
//     b_j = 1/j! * sum over k, j + 2k < P, of (-v/2)^k / k!.
template <int MOST>
DEVICE Fit hermite(const f64* sums, f64 tau, const Noise& noise, f64 shift, f64* c, int terms) {
    f64 m[MOST < 3 ? 3 : MOST];
    int needed = terms < 3 ? 3 : terms;
    Fit fit;
    if (!normalise(sums, m, needed, c, terms, &fit)) return fit;
    f64 mean = m[1], variance = spread(mean, m[2], noise), v = tau * tau * variance;
    f64 power = 1.0, partial = 1.0, k = 0.0;
    for (int j = terms - 1; j >= 0; j--) {
        if ((terms - j) % 2 == 1 && j + 1 < terms) {
            k += 1.0;
            power *= -0.5 * v / k;
            partial += power;
        }
        c[j] = partial;
    }
    f64 factorial = 1.0;
    for (int j = 2; j < terms; j++) {
        factorial *= f64(j);
        c[j] /= factorial;
    }
    // About the mean the terms are small where the logits are; about 0 they would cancel.
    f64 mass = c[0];
    if (variance > 0.0) {
        move_moments(m, needed, -mean);
        m[2] = variance;
        for (int j = 2; j < terms; j++) mass += c[j] * m[j];
    }
    move_polynomial(c, terms, -mean);
    return Fit{mean + 0.5 * v, sums[0] * mass, mean + shift, variance};
}

// `a`: coefficients about the true logit. Sums of orders that are not held are 0.
DEVICE Fit fixed(const f64* a, const f64* sums, int count, const Noise& noise, f64 shift, f64* c, int terms) {
    for (int p = 0; p < terms; p++) c[p] = a[p];
    if (shift != 0.0) move_polynomial(c, terms, shift);
    f64 denominator = 0.0;
    bool nothing = true;
    for (int p = 0; p < terms; p++) {
        denominator += c[p] * sums[p];
        nothing = nothing && sums[p] == 0.0;
    }
    if (nothing) return Fit{-infinity(), denominator, 0.0, 0.0};
    // An order is held where its coefficient is not 0, or where it was given on top of those.
    f64 moment[3];
    for (int p = 0; p < 3; p++) {
        bool held = p < count && (p >= terms || c[p] != 0.0);
        moment[p] = held ? sums[p] / sums[0] : nan();
    }
    f64 mean = moment[0] * moment[1];
    return Fit{0.0 - shift, denominator, mean + shift, spread(mean, moment[2], noise)};
}

}  // namespace series

// Makes the polynomial of one query: writes c[0 .. terms] such that a far key's weight is e^log_scale * sum of
// c_p x^p. `sums` holds `count` D_p (at least `terms`, and 3 for Hermite); `a` the coefficients of RULE_FIXED. True
// logits are x + shift; log_scale is then relative to e^shift. Sums that are not finite, and a D_0 that is negative,
// give NaN.
template <int MOST>
__device__ __noinline__ Fit fit_series(int rule, f64 tau, const f64* a, const f64* sums, int count, Noise noise,
                                       f64 shift, f64* c, int terms) {
    noise.relative = fmax(noise.relative, 8.0 * series::EPSILON);
    if (rule == RULE_GAUSS) return series::gauss<MOST>(sums, count, noise, shift, c, terms);
    if (rule == RULE_HERMITE) return series::hermite<MOST>(sums, tau, noise, shift, c, terms);
    return series::fixed(a, sums, count, noise, shift, c, terms);
}
