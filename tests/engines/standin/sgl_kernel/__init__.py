"""Stands in for SGLang's CPU kernels, of which PyPI has no build: the one that a plain decode needs, in torch."""


def assign_req_to_token_pool_cpu(indices, req_to_token, start, end, out_cache_loc, _width):
    at = 0
    for row, begin, stop in zip(indices.tolist(), start.tolist(), end.tolist(), strict=True):
        req_to_token[row, begin:stop] = out_cache_loc[at : at + stop - begin].to(req_to_token.dtype)
        at += stop - begin


def _absent(name):
    def missing(*_args, **_kwargs):
        raise NotImplementedError(f"sgl_kernel stand-in has no {name}")

    return missing


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _absent(name)
