"""What each operation means: pure functions on tensors in plain PyTorch.

This room is the definition. A kernel may be faster; it may not differ. Shapes stand in the names:

    B batch          T positions      H heads           D head size      R hash rounds
    K buckets        C chunk length   S = R*T slots     N = S/C chunks   W = C*(before+1+after) keys of a chunk
    M = sum(bucket factors) / 2, the width of one rotation

A *slot* is a place in the sorted order: round ``r`` owns slots ``r*T .. (r+1)*T - 1``, and the chunks of all
rounds, laid end to end, form one ring.
"""
