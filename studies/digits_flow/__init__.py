"""The build of the second shipped world: the same digits, captions and autoencoder, drawn by a flow.

`python -m studies.digits_flow build --out FOLDER` trains a tiny Stable Diffusion 3 from nothing.
"""
