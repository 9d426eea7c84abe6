//! Trained parameters as views of flat tensors.
//!
//! Masters, gradients and (elsewhere) moments are each one contiguous fp32 tensor, so that one call
//! updates, reduces, clips or stores everything. Of a model divided over ranks they hold this
//! rank's parts, of which no parameter need be whole.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    rc::Rc,
};

use finetune_contract::Dtype;
use tch::{Device, Kind, Tensor};

use crate::{
    architecture::modules::TensorSpec,
    ops::{self, Codes},
    params::layout::{Layout, Move},
};

/// Flat numbers as a checkpoint has them, fp32, whatever holds them.
#[derive(Debug, Clone, Copy)]
pub enum Flat<'a> {
    /// As they are.
    Floats(&'a Tensor),
    /// In a byte each.
    Codes(&'a Codes),
}

impl Flat<'_> {
    /// Returns how many there are.
    pub fn length(self) -> i64 {
        match self {
            Self::Floats(values) => values.numel() as i64,
            Self::Codes(codes) => codes.length(),
        }
    }

    /// Returns some of them, `[length]` in fp32.
    pub fn part(self, start: i64, length: i64) -> Tensor {
        match self {
            Self::Floats(values) => values.narrow(0, start, length),
            Self::Codes(codes) => codes.values(start, length),
        }
    }

    /// Replaces some of them, or zeroes, by values elsewhere: each of `moves` is from a tensor of
    /// `values` to here.
    pub fn fill(self, values: &[(Tensor, &[Move])]) {
        match self {
            Self::Floats(target) => copy_into(target, 0, values),
            Self::Codes(codes) => codes.replace(|start, length| {
                let window = Tensor::zeros([length], (Kind::Float, codes.device()));
                copy_into(&window, start, values);
                window
            }),
        }
    }
}

/// Copies what is moved to a window that begins at `start`.
fn copy_into(window: &Tensor, start: i64, values: &[(Tensor, &[Move])]) {
    let end = start + window.numel() as i64;
    for (values, moves) in values {
        for &Move { from, to, length } in *moves {
            let [from, to, length] = [from, to, length].map(|index| index as i64);
            let (first, last) = (to.max(start), (to + length).min(end));
            if first < last {
                let some = values.narrow(0, from + first - to, last - first);
                window.narrow(0, first - start, last - first).copy_(&some);
            }
        }
    }
}

/// One parameter as a module sees it.
#[derive(Debug)]
pub struct Param {
    /// The value computed with, in the computation's dtype.
    pub value: Tensor,
    /// Its gradient; `None` for a frozen parameter.
    pub grad: Option<Gradient>,
}

/// Where a parameter's gradient is summed, in fp32.
///
/// What a step computes first is written over what the last one left: zeros in between would be
/// written and read for nothing.
#[derive(Debug, Clone)]
pub struct Gradient {
    sum: Rc<Tensor>,
    is_stale: Rc<Cell<bool>>,
}

impl Gradient {
    /// Wraps a sum that is there.
    pub fn new(sum: Tensor) -> Self {
        Self { sum: Rc::new(sum), is_stale: Rc::new(Cell::new(false)) }
    }

    /// Returns the sum, zeros before anything was added.
    pub fn sum(&self) -> &Tensor {
        if self.is_stale.take() {
            let _ = self.sum.shallow_clone().zero_();
        }
        &self.sum
    }

    /// Adds `leftᵀ · right`, of `[T, M]` and `[T, N]`.
    pub fn add_outer(&self, left: &Tensor, right: &Tensor) {
        let add = if self.is_stale.take() { ops::write_outer } else { ops::add_outer };
        add(left, right, &self.sum);
    }
}

impl Param {
    /// Wraps a value that is not trained.
    pub fn frozen(value: Tensor) -> Self {
        Self { value, grad: None }
    }

    /// Tells whether the parameter is trained.
    pub fn is_trained(&self) -> bool {
        self.grad.is_some()
    }

    /// Returns a second handle on the same parameter, as a tied head needs.
    #[must_use]
    pub fn share(&self) -> Self {
        Self { value: self.value.shallow_clone(), grad: self.grad.clone() }
    }
}

/// Each parameter's first element and shape.
type Places = BTreeMap<String, (usize, Vec<i64>)>;

/// All trained parameters of a run.
#[derive(Debug)]
pub struct FlatParams {
    places: Places,
    names: Vec<String>,
    /// (first element, length, decays) of each parameter, or of this rank's part of it.
    decay_spans: Vec<(usize, usize, bool)>,
    master: Tensor,
    grad: Tensor,
    /// Those given out, by their first element.
    gradients: RefCell<BTreeMap<usize, Gradient>>,
    compute: Tensor,
}

impl FlatParams {
    /// Makes zeroed parameters in the order of `specs`.
    pub fn new(specs: &[TensorSpec], dtype: Dtype, device: Device) -> Self {
        let mut places = BTreeMap::new();
        let mut decay_spans = Vec::new();
        let mut length = 0;
        for spec in specs {
            let elements: usize = spec.shape.iter().product();
            decay_spans.push((length, elements, decays(spec.shape.len())));
            places.insert(
                spec.name.clone(),
                (length, spec.shape.iter().map(|&size| size as i64).collect()),
            );
            length += elements;
        }
        let names = specs.iter().map(|spec| spec.name.clone()).collect();
        Self::zeroed(length, dtype, device, (places, names, decay_spans))
    }

    /// Makes zeroed parts of parameters that are divided over ranks; none of them is whole here.
    pub fn parts(layout: &Layout, dtype: Dtype, device: Device) -> Self {
        let mut decay_spans: Vec<_> = layout
            .names()
            .iter()
            .filter_map(|name| {
                let place = layout.place(name)?;
                let (range, start) = layout.kept(place)?;
                Some((start, range.len(), decays(place.shape.len())))
            })
            .collect();
        decay_spans.sort_unstable();
        let nothing_whole = (BTreeMap::new(), Vec::new(), decay_spans);
        Self::zeroed(layout.part_length(), dtype, device, nothing_whole)
    }

    fn zeroed(
        length: usize,
        dtype: Dtype,
        device: Device,
        (places, names, decay_spans): (Places, Vec<String>, Vec<(usize, usize, bool)>),
    ) -> Self {
        let zeros = |kind| Tensor::zeros([length as i64], (kind, device));
        let master = zeros(Kind::Float);
        let compute = match dtype {
            Dtype::Fp32 => master.shallow_clone(),
            Dtype::Bf16 => zeros(Kind::BFloat16),
        };
        let (grad, gradients) = (zeros(Kind::Float), RefCell::default());
        Self { places, names, decay_spans, master, grad, gradients, compute }
    }

    /// Lists the names, in flat order.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Returns the fp32 masters, flat.
    pub fn master(&self) -> &Tensor {
        &self.master
    }

    /// Returns the fp32 gradients, flat; between [`Self::forget_gradients`] and
    /// [`Self::settle_gradients`] some may be the last step's.
    pub fn grad(&self) -> &Tensor {
        &self.grad
    }

    /// Begins a step: gradients start anew.
    pub fn forget_gradients(&self) {
        let gradients = self.gradients.borrow();
        if gradients.is_empty() {
            // Parts of divided parameters are added to whole.
            let _ = self.grad.shallow_clone().zero_();
        }
        gradients.values().for_each(|gradient| gradient.is_stale.set(true));
    }

    /// Ends the micro-batches of a step: what they computed nothing of is zero.
    pub fn settle_gradients(&self) {
        self.gradients.borrow().values().for_each(|gradient| {
            gradient.sum();
        });
    }

    /// Returns what modules compute with, flat; in fp32 the masters themselves.
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
        let grad = self.gradient(self.places.get(name)?.0, self.view(&self.grad, name)?);
        Some(Param { value: self.view(&self.compute, name)?, grad: Some(grad) })
    }

    /// Gives a gradient out: every holder of one knows what others added to it.
    fn gradient(&self, first: usize, view: Tensor) -> Gradient {
        let mut gradients = self.gradients.borrow_mut();
        gradients.entry(first).or_insert_with(|| Gradient::new(view)).clone()
    }

    /// Returns matrices that lie one after another as one, `[Σ rows, columns]`; `None` if there are
    /// none.
    ///
    /// # Panics
    /// If they lie apart or one is not trained.
    pub fn stacked(&self, names: &[String]) -> Option<Param> {
        let places: Vec<_> = names.iter().map(|name| &self.places[name]).collect();
        let &(first, ref shape) = *places.first()?;
        let (mut end, mut rows) = (first, 0);
        for (offset, shape) in places {
            assert_eq!(*offset, end, "{names:?} lie apart");
            end += shape.iter().product::<i64>() as usize;
            rows += shape[0];
        }
        let view = |flat: &Tensor| {
            flat.narrow(0, first as i64, (end - first) as i64).view([rows, shape[1]])
        };
        let grad = self.gradient(first, view(&self.grad));
        Some(Param { value: view(&self.compute), grad: Some(grad) })
    }

    /// Returns where a parameter begins in the flat tensors; `None` if it is not trained whole.
    pub fn first_element(&self, name: &str) -> Option<i64> {
        self.places.get(name).map(|(first, _)| *first as i64)
    }

    /// Lists each parameter's first element and length in the flat tensors, with whether it decays.
    pub fn decay_spans(&self) -> Vec<(usize, usize, bool)> {
        self.decay_spans.clone()
    }

    /// Copies the masters to what modules compute with, after they changed.
    pub fn refresh_compute(&mut self) {
        // In fp32 both are the same tensor.
        if self.compute.kind() != Kind::Float {
            self.compute.copy_(&self.master);
        }
    }

    fn view(&self, flat: &Tensor, name: &str) -> Option<Tensor> {
        let (offset, shape) = self.places.get(name)?;
        let length: i64 = shape.iter().product();
        Some(flat.narrow(0, *offset as i64, length).view(shape.as_slice()))
    }
}

/// Tells whether a parameter of so many dimensions decays.
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
    fn a_step_begins_anew_whoever_adds_first() {
        let specs = ["first", "second", "third"]
            .map(|name| TensorSpec { name: name.to_owned(), shape: vec![2, 2] });
        let params = FlatParams::new(&specs, Dtype::Fp32, Device::Cpu);
        let [first, second, _third] = ["first", "second", "third"]
            .map(|name| params.param(name).and_then(|param| param.grad).unwrap());
        let again = params.param("first").and_then(|param| param.grad).unwrap();
        let (one, two) = (Tensor::ones([1, 2], (Kind::Float, Device::Cpu)), Tensor::from(2.0_f32));
        for step in 0..2 {
            let _ = params.grad().shallow_clone().fill_(7.0);
            params.forget_gradients();
            first.add_outer(&one, &one);
            again.add_outer(&one, &one);
            let _ = second.sum().shallow_clone().g_add_(&two);
            second.add_outer(&one, &one);
            params.settle_gradients();
            let found = Vec::<f32>::try_from(params.grad()).unwrap();
            assert_eq!(
                found,
                [2.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0, 3.0, 0.0, 0.0, 0.0, 0.0],
                "{step}"
            );
        }
    }
}
