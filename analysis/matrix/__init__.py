"""The pretrain × fine-tune matrix: models pretrained by several optimizers, each fine-tuned by several."""
