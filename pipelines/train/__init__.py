"""Fine-tuning: a model, chat data and a recipe in; an adapter and a merged model out."""
