//! Trained parameters as views of flat tensors.
//!
//! Masters, gradients and (elsewhere) moments are each one contiguous fp32 tensor, so that one call
//! updates, reduces, clips or stores everything. If parameters are sharded, the flat tensors hold
//! this rank's shards, and a parameter may be incomplete in them.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    rc::Rc,
};

use finetune_contract::Dtype;
use tch::{Device, Kind, Tensor};

use crate::{
    architecture::modules::TensorSpec,
    ops::{self, Factor, QuantizedState},
    params::layout::{CopyRange, Layout},
};

/// A flat state tensor, in fp32 or quantized; checkpoints always store fp32.
#[derive(Debug, Clone, Copy)]
pub enum FlatState<'a> {
    /// `[length]`, fp32.
    Fp32(&'a Tensor),
    /// Blockwise quantized to 8 bits.
    Quantized(&'a QuantizedState),
}

impl FlatState<'_> {
    /// Returns the number of elements.
    pub fn length(self) -> i64 {
        match self {
            Self::Fp32(values) => values.numel() as i64,
            Self::Quantized(state) => state.length(),
        }
    }

    /// Returns a range of elements, `[length]` in fp32.
    pub fn slice(self, start: i64, length: i64) -> Tensor {
        match self {
            Self::Fp32(values) => values.narrow(0, start, length),
            Self::Quantized(state) => state.dequantize(start, length),
        }
    }

    /// Copies ranges of other flat fp32 tensors into this one.
    ///
    /// Elements outside the ranges keep their values, or become zero in a quantized state.
    pub fn copy_from(self, sources: &[(Tensor, &[CopyRange])]) {
        match self {
            Self::Fp32(target) => copy_into(target, 0, sources),
            Self::Quantized(state) => state.quantize(|start, length| {
                let window = Tensor::zeros([length], (Kind::Float, state.device()));
                copy_into(&window, start, sources);
                window
            }),
        }
    }
}

/// Copies the part of each range that falls into a window of the destination, which begins at
/// `start`.
fn copy_into(window: &Tensor, start: i64, sources: &[(Tensor, &[CopyRange])]) {
    let end = start + window.numel() as i64;
    for (source, ranges) in sources {
        for &CopyRange { from, to, length } in *ranges {
            let [from, to, length] = [from, to, length].map(|index| index as i64);
            let (first, last) = (to.max(start), (to + length).min(end));
            if first < last {
                let part = source.narrow(0, from + first - to, last - first);
                window.narrow(0, first - start, last - first).copy_(&part);
            }
        }
    }
}

/// One parameter as modules use it.
///
/// Products take a matrix as a [`Factor`]; everything else reads the value itself.
#[derive(Debug)]
pub struct Param {
    /// In the compute dtype.
    value: Tensor,
    /// Its gradient; `None` for a frozen parameter.
    pub grad: Option<Gradient>,
}

/// The gradient of a parameter, summed in fp32.
///
/// The first gradient of a step overwrites the last step's sum instead of being added to zeros,
/// which saves a pass over memory.
#[derive(Debug, Clone)]
pub struct Gradient {
    sum: Rc<Tensor>,
    is_stale: Rc<Cell<bool>>,
}

impl Gradient {
    /// Wraps an existing sum.
    pub fn new(sum: Tensor) -> Self {
        Self { sum: Rc::new(sum), is_stale: Rc::new(Cell::new(false)) }
    }

    /// Returns the sum, zeroed if this step has added nothing yet.
    pub fn sum(&self) -> &Tensor {
        if self.is_stale.take() {
            let _ = self.sum.shallow_clone().zero_();
        }
        &self.sum
    }

    /// Adds `leftᵀ · right`, where `left` is `[T, M]` and `right` is `[T, N]`.
    pub fn add_outer(&self, left: &Tensor, right: &Tensor) {
        let add = if self.is_stale.take() { ops::write_outer } else { ops::add_outer };
        add(left, right, &self.sum);
    }
}

impl Param {
    /// Creates a parameter with a value in the compute dtype; without `grad` it is frozen.
    pub fn new(value: Tensor, grad: Option<Gradient>) -> Self {
        Self { value, grad }
    }

    /// Creates a parameter that is not trained.
    pub fn frozen(value: Tensor) -> Self {
        Self::new(value, None)
    }

    /// Returns the value, in the compute dtype.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// Returns a matrix as the right operand of a product.
    pub fn factor(&self) -> Factor<'_> {
        Factor::Plain(&self.value)
    }

    /// Returns the transpose of a matrix as the right operand of a product.
    pub fn transposed_factor(&self) -> Factor<'_> {
        Factor::Transposed(&self.value)
    }

    /// Reports whether the parameter is trained.
    pub fn is_trained(&self) -> bool {
        self.grad.is_some()
    }

    /// Returns a second handle on the same parameter, for tied embeddings.
    #[must_use]
    pub fn share(&self) -> Self {
        Self { value: self.value.shallow_clone(), grad: self.grad.clone() }
    }
}

/// Each parameter's first element and shape.
type Slots = BTreeMap<String, (usize, Vec<i64>)>;

/// All trained parameters of a run.
#[derive(Debug)]
pub struct FlatParams {
    slots: Slots,
    names: Vec<String>,
    /// (first element, length, decays) of each parameter, or of this rank's shard of it.
    decay_spans: Vec<(usize, usize, bool)>,
    master: Tensor,
    grad: Tensor,
    /// The gradients in use, by first element.
    gradients: RefCell<BTreeMap<usize, Gradient>>,
    compute: Tensor,
}

impl FlatParams {
    /// Creates zeroed parameters in the order of `specs`.
    pub fn new(specs: &[TensorSpec], dtype: Dtype, device: Device) -> Self {
        let mut slots = BTreeMap::new();
        let mut decay_spans = Vec::new();
        let mut length = 0;
        for spec in specs {
            let elements: usize = spec.shape.iter().product();
            decay_spans.push((length, elements, decays(spec.shape.len())));
            slots.insert(
                spec.name.clone(),
                (length, spec.shape.iter().map(|&size| size as i64).collect()),
            );
            length += elements;
        }
        let names = specs.iter().map(|spec| spec.name.clone()).collect();
        Self::zeroed(length, dtype, device, (slots, names, decay_spans))
    }

    /// Creates zeroed shards of parameters; [`Self::param`] finds none of them.
    pub fn sharded(layout: &Layout, dtype: Dtype, device: Device) -> Self {
        let mut decay_spans: Vec<_> = layout
            .names()
            .iter()
            .filter_map(|name| {
                let slot = layout.slot(name)?;
                let (range, start) = layout.local_range(slot)?;
                Some((start, range.len(), decays(slot.shape.len())))
            })
            .collect();
        decay_spans.sort_unstable();
        let index = (BTreeMap::new(), Vec::new(), decay_spans);
        Self::zeroed(layout.shard_length(), dtype, device, index)
    }

    fn zeroed(
        length: usize,
        dtype: Dtype,
        device: Device,
        (slots, names, decay_spans): (Slots, Vec<String>, Vec<(usize, usize, bool)>),
    ) -> Self {
        let zeros = |kind| Tensor::zeros([length as i64], (kind, device));
        let master = zeros(Kind::Float);
        let compute = match dtype {
            Dtype::Fp32 => master.shallow_clone(),
            Dtype::Bf16 => zeros(Kind::BFloat16),
        };
        let (grad, gradients) = (zeros(Kind::Float), RefCell::default());
        Self { slots, names, decay_spans, master, grad, gradients, compute }
    }

    /// Lists the names, in flat order.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Returns the fp32 masters, flat.
    pub fn master(&self) -> &Tensor {
        &self.master
    }

    /// Returns the fp32 gradients, flat; between [`Self::zero_grad`] and
    /// [`Self::zero_stale_gradients`] some may be the last step's.
    pub fn grad(&self) -> &Tensor {
        &self.grad
    }

    /// Resets all gradients at the start of a step.
    pub fn zero_grad(&self) {
        let gradients = self.gradients.borrow();
        if gradients.is_empty() {
            // The shards of gradients have no `Gradient`s.
            let _ = self.grad.shallow_clone().zero_();
        }
        gradients.values().for_each(|gradient| gradient.is_stale.set(true));
    }

    /// Zeroes the gradients to which no micro-batch of the step has added anything.
    pub fn zero_stale_gradients(&self) {
        self.gradients.borrow().values().for_each(|gradient| {
            gradient.sum();
        });
    }

    /// Returns the parameters in the compute dtype, flat; in fp32 these are the masters.
    pub fn compute(&self) -> &Tensor {
        &self.compute
    }

    /// Returns the fp32 master of one parameter, as a view.
    pub fn master_of(&self, name: &str) -> Option<Tensor> {
        self.view(&self.master, name)
    }

    /// Returns the fp32 gradient of one parameter, as a view.
    pub fn grad_of(&self, name: &str) -> Option<Tensor> {
        self.view(&self.grad, name)
    }

    /// Returns one parameter as a module uses it; `None` if it is not trained.
    pub fn param(&self, name: &str) -> Option<Param> {
        let grad = self.gradient(self.slots.get(name)?.0, self.view(&self.grad, name)?);
        Some(Param::new(self.view(&self.compute, name)?, Some(grad)))
    }

    /// Returns the gradient at an element, which all holders share.
    fn gradient(&self, first: usize, view: Tensor) -> Gradient {
        let mut gradients = self.gradients.borrow_mut();
        gradients.entry(first).or_insert_with(|| Gradient::new(view)).clone()
    }

    /// Returns matrices that are contiguous in the flat tensor as one, `[Σ rows, columns]`; `None`
    /// for no names.
    ///
    /// # Panics
    /// If they are not contiguous, or one is not trained.
    pub fn stacked(&self, names: &[String]) -> Option<Param> {
        let slots: Vec<_> = names.iter().map(|name| &self.slots[name]).collect();
        let &(first, ref shape) = *slots.first()?;
        let (mut end, mut rows) = (first, 0);
        for (offset, shape) in slots {
            assert_eq!(*offset, end, "{names:?} are not contiguous");
            end += shape.iter().product::<i64>() as usize;
            rows += shape[0];
        }
        let view = |flat: &Tensor| {
            flat.narrow(0, first as i64, (end - first) as i64).view([rows, shape[1]])
        };
        let grad = self.gradient(first, view(&self.grad));
        Some(Param::new(view(&self.compute), Some(grad)))
    }

    /// Returns the first element of a parameter in the flat tensors; `None` if it is frozen or
    /// sharded.
    pub fn first_element(&self, name: &str) -> Option<i64> {
        self.slots.get(name).map(|(first, _)| *first as i64)
    }

    /// Lists the first element and length of each parameter in the flat tensors, and whether weight
    /// decay applies to it.
    pub fn decay_spans(&self) -> Vec<(usize, usize, bool)> {
        self.decay_spans.clone()
    }

    /// Copies the masters to the compute dtype after they changed.
    pub fn refresh_compute(&mut self) {
        // In fp32 both are the same tensor.
        if self.compute.kind() != Kind::Float {
            self.compute.copy_(&self.master);
        }
    }

    fn view(&self, flat: &Tensor, name: &str) -> Option<Tensor> {
        let (offset, shape) = self.slots.get(name)?;
        let length: i64 = shape.iter().product();
        Some(flat.narrow(0, *offset as i64, length).view(shape.as_slice()))
    }
}

/// Reports whether weight decay applies to a parameter of so many dimensions.
///
/// Weight decay pulls matrices towards zero; vectors (norm weights, biases) set scales and offsets,
/// which zero is no sensible prior for.
const fn decays(dimensions: usize) -> bool {
    dimensions >= 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_addition_of_a_step_overwrites_the_gradient() {
        let specs = ["first", "second", "third"]
            .map(|name| TensorSpec { name: name.to_owned(), shape: vec![2, 2] });
        let params = FlatParams::new(&specs, Dtype::Fp32, Device::Cpu);
        let [first, second, _third] = ["first", "second", "third"]
            .map(|name| params.param(name).and_then(|param| param.grad).unwrap());
        let again = params.param("first").and_then(|param| param.grad).unwrap();
        let (one, two) = (Tensor::ones([1, 2], (Kind::Float, Device::Cpu)), Tensor::from(2.0_f32));
        for step in 0..2 {
            let _ = params.grad().shallow_clone().fill_(7.0);
            params.zero_grad();
            first.add_outer(&one, &one);
            again.add_outer(&one, &one);
            let _ = second.sum().shallow_clone().g_add_(&two);
            second.add_outer(&one, &one);
            params.zero_stale_gradients();
            let found = Vec::<f32>::try_from(params.grad()).unwrap();
            assert_eq!(
                found,
                [2.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0, 3.0, 0.0, 0.0, 0.0, 0.0],
                "{step}"
            );
        }
    }
}
