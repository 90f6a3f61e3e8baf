"""The op in plain numpy, one token at a time: what every implementation is held to."""

import numpy as np


def ragged_paged_attention_reference(
    q, k, v, kv_pages, page_table, kv_lens, query_starts, counts, *, scale, window=None, softcap=None, sinks=None, kv_scales=None
):
    """See `api.ragged_paged_attention`; arrays are numpy's, and rows of `out` past the last token are zero."""
    kv_pages, out = kv_pages.copy(), np.zeros(q.shape, np.float64)
    page_size, group = kv_pages.shape[3], q.shape[1] // k.shape[1]
    scales = np.ones((2, k.shape[1])) if kv_scales is None else np.asarray(kv_scales, np.float64)

    def stored(x, part):
        x = x.astype(np.float64) / scales[part][:, None]
        if kv_pages.dtype == np.int8:
            x = np.rint(np.clip(x, -127, 127))
        elif kv_pages.dtype.itemsize == 1:
            x = np.clip(x, -448, 448)
        return x.astype(np.float32).astype(kv_pages.dtype)

    for n in range(counts[1]):
        rows = range(query_starts[n], query_starts[n + 1])
        for row, position in zip(rows, range(kv_lens[n] - len(rows), kv_lens[n]), strict=True):
            page, slot = page_table[n, position // page_size], position % page_size
            kv_pages[page, 0, :, slot], kv_pages[page, 1, :, slot] = stored(k[row], 0), stored(v[row], 1)
    for n in range(counts[1]):
        rows = range(query_starts[n], query_starts[n + 1])
        for row, position in zip(rows, range(kv_lens[n] - len(rows), kv_lens[n]), strict=True):
            first = 0 if window is None else max(0, position - window + 1)
            seen = [kv_pages[page_table[n, p // page_size], :, :, p % page_size] for p in range(first, position + 1)]
            for head in range(q.shape[1]):
                h = head // group
                keys, values = (np.stack([kv[i, h] for kv in seen]).astype(np.float64) * scales[i, h] for i in (0, 1))
                scores = keys @ q[row, head].astype(np.float64) * scale
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                if sinks is not None:
                    scores, values = np.append(scores, sinks[head]), np.concatenate([values, np.zeros((1, values.shape[1]))])
                weights = np.exp(scores - scores.max())
                out[row, head] = weights / weights.sum() @ values
    return out.astype(q.dtype), kv_pages
