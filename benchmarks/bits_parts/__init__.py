"""Parts of `bits.py`: what a row is, the compiler and stock quantizers as rows, and the page with its picture."""
