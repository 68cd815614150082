"""The noise of sampling in NumPy, as include/clusterfusion/sampling.hpp defines it."""

import numpy as np

MASK = np.uint64(0xFFFFFFFF)


def philox4x32_10(counter: list[np.ndarray], key: tuple[int, int]) -> list[np.ndarray]:
    """Ten rounds of Philox4x32 (Salmon et al., SC 2011): four words, uint64 arrays below 2**32."""
    words = [np.asarray(word, np.uint64) for word in counter]
    keys = [np.uint64(word) for word in key]
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * words[0], np.uint64(0xCD9E8D57) * words[2]
        words = [
            (second >> np.uint64(32)) ^ words[1] ^ keys[0],
            second & MASK,
            (first >> np.uint64(32)) ^ words[3] ^ keys[1],
            first & MASK,
        ]
        keys = [
            (keys[0] + np.uint64(0x9E3779B9)) & MASK,
            (keys[1] + np.uint64(0xBB67AE85)) & MASK,
        ]
    return words


def gumbel_noise(seed: int, position: int, vocab_size: int) -> np.ndarray:
    """Float32 [vocab_size]: the noise of each token at one position of a text."""
    groups = np.arange(-(-vocab_size // 4), dtype=np.uint64)
    zeros = np.zeros_like(groups)
    counter = [groups, zeros, zeros + np.uint64(position & 0xFFFFFFFF), zeros + (position >> 32)]
    words = philox4x32_10(counter, (seed & 0xFFFFFFFF, seed >> 32))
    uniform = (np.stack(words, axis=1).ravel()[:vocab_size] + 0.5) * 2.0**-32
    return (-np.log(-np.log(uniform))).astype(np.float32)
