"""Lane programs: what one GPU thread does, written once and run on two machines.

Pallas' arrays are the right altitude for tensor-core pipelines, but not for a kernel whose speed is
decided by which lane loads which 16 bytes. Such a kernel is written here as a *lane program*: a
Python function of a machine `m` that says what one thread of a block does, with 32-bit words,
float32 numbers, loops and the warp's collective instructions.

- `simt.mlir.Machine` turns it into instructions inside a Mosaic GPU kernel (`plgpu.inline_mgpu`).
- `simt.emulate.Machine` runs it on NumPy arrays that hold one value per thread, with every load and
  store checked against the bounds of its buffer. So the very same source that becomes SASS is
  tested, index by index, where there is no GPU.

Values support Python's operators: words (unsigned, 32 bits, wrapping)
`+ - * // % & | ^ << >> < >= ==`, floats `+ *`, flags `&`. Only shapes and constants known while the
kernel is traced may be Python numbers; branches and loops over values go through `m.loop`.
"""
