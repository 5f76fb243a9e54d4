"""Operations on a CPU: slabs that stay in the cache, batched matrix products, radix sort; torch and numpy only.

Letters as in ``ops``; n is the number of chunks in a slab. Every call makes the few megabytes that it works in, so
threads share nothing.
"""
