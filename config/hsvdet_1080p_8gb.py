# Scale l at 1920x1088, effective batch 16, under a hard cap of 8 GB of GPU memory. On an H100 it took 1.8 GiB
# (RESULTS.md, "On a GPU"); no card of 8 GB was at hand yet.
#   python train.py config/hsvdet_1080p_8gb.py --train_data=... --val_data=...
#   python bench.py memory config/hsvdet_1080p_8gb.py                 where the memory goes
exec(open('config/hsvdet_coco20.py').read())
out_dir = 'out/hsvdet_1080p_8gb'
train_images = val_images = ''
imgsz = (1088, 1920)         # 1,080 rows do not divide by 32
grad_accum = 16                   # one image at a time; the gradient is that of the batch of 16
checkpointing = True         # recompute activations in the backward pass
memory_cap_gb = 7.0          # for PyTorch; CUDA's own context and libraries take up to 1 GB beside it
