"""What the processes of tests/ops/test_vocab_parallel.py run: `python -m vocab_parallel <rank>
<processes> <folder>` is one of them.

`ranks` is what every check relies on; `rows` checks losses of logits, `heads` the fused-linear
ones, `agreement` what the processes exchange and when they refuse.
"""
