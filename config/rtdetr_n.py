# RT-DETR at a size that fits the backbone of scale n (D-FINE-N's: 128 channels, three decoder layers), trained by Muon.
# It changes what another config file says, so it comes second:
#   python train.py config/shapes.py config/rtdetr_n.py
# figures: RESULTS.md, "Three detectors"
out_dir = 'out/rtdetr_n'
arch = 'rtdetr'

hidden = 128                 # published: 256, six layers, 300 queries, for backbones of 20 M parameters and more
ffn = 512
decoder_layers = 3
queries = 100
points = 2
class_loss = 'mal'           # DEIM's: claims half the epochs
optimizer = 'muon'           # a set predictor learns slowly: AdamW's 88 steps on small data ended at AP 0.22
momentum = 0.95
lr = 5e-3                    # a third of what the convolutions alone take
